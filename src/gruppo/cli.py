"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="gruppo",
    help="Group-relative policy optimization: every published method as one readable recipe under one training loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live display.")]


@app.callback()
def options(debug: Debug = False) -> None:
    # `main` reads --debug from the command line itself: the error may be raised before this runs
    pass


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """Every recipe: arXiv id, nickname, family, what it needs, one sentence."""
    from gruppo.recipes import RECIPES

    rows = []
    for entry in RECIPES.values():
        needs = [n.name for n in entry.factory().needs]
        row = {"id": entry.arxiv, "nickname": entry.nickname, "family": entry.family}
        rows.append(row | {"needs": ", ".join(needs) or "-", "sentence": entry.sentence})
    table(rows, as_json)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="arXiv id or nickname.")],
    as_json: Json = False,
) -> None:
    """Formulas, needs, deviations and the computed difference of a recipe to its base."""
    from gruppo.recipe import describe, difference
    from gruppo.recipes import find

    entry = find(recipe)
    if as_json:
        base = find(entry.base).factory() if entry.base else None
        made = entry.factory()
        changed = {} if base is None else difference(made, base)
        told = {
            "id": entry.arxiv,
            "nickname": entry.nickname,
            "title": entry.title,
            "sentence": entry.sentence,
            "numbers": {k: describe(v) for k, v in entry.numbers.items()},
            "needs": [n.name for n in made.needs],
            "base": entry.base,
            "difference": {slot: {"base": describe(a), "here": describe(b)} for slot, (a, b) in changed.items()},
        }
        print(json.dumps(told, indent=1))
        return
    from gruppo.docs import page

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(page(entry.arxiv)))
    else:
        print(page(entry.arxiv))


@app.command()
def worlds(
    action: Annotated[str | None, typer.Argument(metavar="[build]", help="`build` trains a base model again.")] = None,
    name: Annotated[str | None, typer.Argument(help="The world to build.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to put a built model.  [default: ./NAME-base]")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    as_json: Json = False,
) -> None:
    """The embedded tasks and their base models; `worlds build NAME` trains a base model again from nothing."""
    from gruppo.runs.config import nearest
    from gruppo.types import GruppoError
    from gruppo.worlds import WORLDS

    if action is None:
        table([world_row(world) for world in WORLDS.values()], as_json)
        return
    if action != "build" or name is None:
        raise GruppoError(
            f"`gruppo worlds {action}` is nothing; `gruppo worlds` lists them, `gruppo worlds build NAME` builds one"
        )
    if name not in WORLDS:
        raise GruppoError(f"there is no world {name!r}; {nearest(name, WORLDS)}")
    out = folder or Path(f"{name}-base")
    if out.exists() and any(out.iterdir()):
        raise GruppoError(f"{out} exists and is not empty; nothing was overwritten, choose another --folder")
    WORLDS[name].build(out, seed, print)
    print(f"saved {out}")


def world_row(world: Any) -> dict[str, str]:
    """A world's line in the table."""
    size = sum(f.stat().st_size for f in world.base.glob("*")) / 2**20 if world.base.is_dir() else 0.0
    asked = world.held_out(1)[0].prompt
    text = asked if isinstance(asked, str) else asked[-1]["content"]
    return {"name": world.name, "about": world.sentence, "base": f"{size:.1f} MB", "example": text.splitlines()[0]}


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN.yaml] [section.key=value ...]", help="A run file, and settings that beat it."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="arXiv id or nickname; `gruppo list` shows them.")] = None,
    world: Annotated[str | None, typer.Option(help="An embedded world; `gruppo worlds` shows them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A hub id or folder: a causal language model, or a diffusers pipeline.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSONL, JSON, Parquet, CSV or a saved dataset, with a column `prompt`.")
    ] = None,
    offline: Annotated[
        list[str] | None,
        typer.Option(help="Train on stored groups instead of sampling: a parquet file, a folder or a run; may be repeated."),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="module:function, file.py:function or a reward model's folder; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's folder below --folder; made up when not given.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where runs are kept.  [default: runs]")] = None,
    track: Annotated[list[str] | None, typer.Option(help="trackio, wandb or tensorboard, beside the run folder.")] = None,
    plain: Plain = False,
    dry: Annotated[bool, typer.Option("--dry", help="Check and print the resolved run file, then stop.")] = False,
) -> None:
    """Train. With nothing at all: GRPO on the world `arithmetic`; the world `glyphs` paints, with MixGRPO.

    Later beats earlier: the world's defaults, the run file, the options and settings given here.

    Examples:

      gruppo train --recipe dapo --world countdown fit.steps=40

      gruppo train --model ./my-model --data problems.jsonl --reward my_rewards:correct policy.temperature=0.8

      gruppo train --recipe rec-oneside --world arithmetic --offline runs/grpo-arithmetic

      gruppo train run.yaml fit.learning_rate=3e-6 --name second-try
    """
    from gruppo.runs.config import assemble, dump, overrides, read

    words = list(words or ())
    files = [w for w in words if "=" not in w]
    given = read(Path(files[0])) if files else {}
    if len(files) > 1:
        from gruppo.types import GruppoError

        raise GruppoError(f"{files[1]!r} is neither a setting (section.key=value) nor the first run file; one run file is read")
    asked = {
        "recipe": recipe,
        "world": world,
        "model": model,
        "data": data,
        "offline": offline,
        "rewards": reward,
        "name": name,
        "folder": folder,
    }
    layers = [{k: v for k, v in asked.items() if v}, {"track": {"to": track}} if track else {}]
    config = assemble(given, *layers, overrides([w for w in words if "=" in w]))
    if dry:
        print(dump(config), end="")
        return
    from gruppo.runs.session import Session

    drive(Session.new(config, say=say), plain)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    plain: Plain = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint, as if nothing had happened."""
    from gruppo.runs.session import Session

    drive(Session.resume(run, say=say), plain)


def drive(session: Any, plain: bool) -> None:
    """Run a session under the terminal display, then write the report."""
    from rich.console import Console

    from gruppo.runs.config import derived
    from gruppo.runs.show import Show

    console = Console()
    config = session.config
    with Show(console, config.ends[-1], config.track.show_every, plain) as shown, stopped_at_once(session):
        session.say = shown.say
        settings = {k: v for k, v in config.model_dump(mode="json", exclude_none=True).items() if v not in ({}, [], None)}
        shown.start(settings, {**derived(config), "run folder": str(session.folder.path), **session.facts()})
        before, after = session.run(shown)
        shown.finish(before, after, report_of(session))


@contextmanager
def stopped_at_once(session: Any) -> Iterator[None]:
    """A second Ctrl-C, or one outside the steps, as a sentence."""
    try:
        yield
    except KeyboardInterrupt:
        from gruppo.runs.interrupt import Interrupted

        raise Interrupted(f"stopped at once; gruppo resume {session.folder.path} goes on from the last checkpoint", 130) from None


def report_of(session: Any) -> Path | None:
    """The HTML report's path; None when the run wants none."""
    if not session.config.track.report:
        return None
    from gruppo.runs.report import write_report

    return write_report(session.folder.path)


@app.command(name="eval")
def eval_(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a model folder or a hub id.")],
    world: Annotated[str | None, typer.Option(help="Held-out problems of an embedded world.")] = None,
    data: Annotated[str | None, typer.Option(help="Problems of your own, with a column `prompt`.")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="module:function or file.py:function; may be repeated.")] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint of a run; the last one by default.")] = None,
    tasks: Annotated[int | None, typer.Option(help="At most this many problems.")] = None,
    samples: Annotated[int | None, typer.Option(help="Sampled paths per problem.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Settings that beat the run's own.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A function of groups, as module:function; may be repeated.")] = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """pass@k, mean@n, majority@n and greedy accuracy on held-out problems, with intervals, overall and by difficulty."""
    from gruppo.api import evaluation_of
    from gruppo.runs.config import overrides

    found = evaluation_of(
        target,
        world=world,
        data=data,
        rewards=reward,
        step=step,
        tasks=tasks,
        samples=samples,
        settings=overrides(settings or ()),
        metrics=metric or (),
        seed=seed,
        say=say,
    )
    if as_json:
        print(found.to_json())
        return
    table([{k: number(v) for k, v in row.items()} for row in found.rows()], False)
    print(", ".join(f"{v} {k}" for k, v in found.counts.items()))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write one self-contained HTML file about a run: curves, rewards, groups to browse."""
    from gruppo.runs.folder import RunFolder
    from gruppo.runs.report import write_report

    print(write_report(RunFolder.open(run).path))


@app.command()
def compare(
    words: Annotated[
        list[str], typer.Argument(metavar="ID ID ... [section.key=value ...]", help="Recipes, and settings for all of them.")
    ],
    world: Annotated[str | None, typer.Option(help="An embedded world; `gruppo worlds` shows them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A hub id or folder: a causal language model, or a diffusers pipeline.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Problems with a column `prompt`.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="module:function, file.py:function or a reward model's folder; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per recipe.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Share by which sampled paths and tokens may differ unmarked.")] = 0.0,
    name: Annotated[str | None, typer.Option(help="The comparison's folder below --folder.")] = None,
    folder: Annotated[Path, typer.Option(help="Where comparisons are kept.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train several recipes under the same conditions and compare them, with intervals over seeds.

    The same command again goes on where it was stopped. A setting for one recipe alone has its name in front.

    Examples:

      gruppo compare grpo dapo rloo --world arithmetic --seeds 5

      gruppo compare grpo gspo fit.steps=40 gspo:fit.learning_rate=1e-5

      gruppo compare dapo wide=dapo wide:recipe_args.high=0.5
    """
    from gruppo.runs.compare import PAGE, named, own_settings
    from gruppo.runs.compare import compare as run
    from gruppo.runs.config import overrides

    recipes, settings = named(words)
    common, alone = own_settings(settings)
    found = run(
        recipes,
        world=world,
        model=model,
        data=data,
        rewards=reward or (),
        seeds=seeds,
        settings=overrides(common),
        own={recipe: overrides(given) for recipe, given in alone.items()},
        tolerance=tolerance,
        name=name,
        folder=folder,
        say=say,
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    table(found.table(), False)
    print("\n".join(found.notes()))
    print(found.folder / PAGE)


@app.command()
def claim(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The recipe whose claim is measured; none lists them.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Measurements, at least 2.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure a paper's claim at toy scale: the figure, its interval, and whether the claim holds. Exits with 0 either way."""
    from gruppo.claims import CLAIMS, about, measured

    if recipe is None:
        table([{"claim": name, "measured": about(name)} for name in CLAIMS], as_json)
        return
    found = measured(recipe, seeds)
    if as_json:
        print(json.dumps(found_claim(found), indent=1))
        return
    print(f"The paper: {found.sentence}\nMeasured:  {found.measured}\n")
    table([{k: number(v) for k, v in row.items()} for row in found.table()], False)
    print(f"\n{found.verdict}")


def found_claim(found: Any) -> dict[str, Any]:
    """A measured claim as plain values; an open end of the expected range is null."""
    from gruppo.runs.measure import finite

    told = {"name": found.name, "sentence": found.sentence, "measured": found.measured, "figure": found.figure}
    told |= {"mean": found.mean, "interval": list(found.interval), "expected": [finite(v) for v in found.expected]}
    return told | {"holds": found.holds, "verdict": found.verdict, "rows": [dict(row) for row in found.rows]}


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="A model folder or hub id; an embedded base model by default.")] = None,
    world: Annotated[str | None, typer.Option(help="The base model of this world, or its prompts for --model.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Settings of the run that is planned.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Train three steps in their own process and say what memory they took.")] = False,
    as_json: Json = False,
) -> None:
    """Measure on this machine and model what training relies on; exits with 1 when something is broken."""
    from gruppo.runs.doctor import main as examine

    raise typer.Exit(examine(model, as_json, world, settings or (), measure))


@app.command()
def sft(
    model: Annotated[str, typer.Option(help="A model folder or hub id.")],
    data: Annotated[str, typer.Option(help="JSONL with prompt and completion, or messages.")],
    output: Annotated[str, typer.Option(help="A new folder for the tuned model.")],
    epochs: float = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; beats --epochs.")] = None,
    step_tokens: int = 8192,
    row_tokens: int = 512,
    learning_rate: float = 1e-5,
    warmup: int = 10,
    seed: int = 0,
) -> None:
    """Supervised fine-tuning on completions only, packed into rows."""
    from gruppo.sft import fine_tune

    for done in fine_tune(
        model,
        data,
        output,
        epochs=epochs,
        steps=steps,
        step_tokens=step_tokens,
        row_tokens=row_tokens,
        learning_rate=learning_rate,
        warmup=warmup,
        seed=seed,
    ):
        print(f"step {done.step}  loss {done.loss:.4f}", flush=True)
    print(f"saved {output}")


judges = typer.Typer(help="Reward models with several heads.", no_args_is_help=True)
app.add_typer(judges, name="reward-model")


@judges.command(name="fit")
def fit_reward_model(
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id of an encoder or a causal model.")],
    data: Annotated[str, typer.Option(help="JSONL with prompt, completion and a column of labels per head; null = no label.")],
    heads: Annotated[str, typer.Option(help="The heads' names, which are the columns of labels, as a,b,c.")],
    output: Annotated[str, typer.Option(help="A new folder for the reward model.")],
    epochs: float = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; beats --epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Rows per optimizer step.")] = 32,
    learning_rate: float = 1e-5,
    warmup: int = 10,
    held_out: Annotated[float, typer.Option(help="Share of the distinct prompts that scores the heads.")] = 0.1,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Fit one head per objective to labels by squared error; `gruppo train --reward OUTPUT` trains on the heads.

    Example:

      gruppo reward-model fit --model ./base --data labels.jsonl --heads politeness,safety --output ./judge
    """
    from dataclasses import asdict

    from gruppo.reward_model import fit_folder, saved_scores

    names = [name.strip() for name in heads.split(",")]
    for done in fit_folder(
        model,
        data,
        output,
        names,
        epochs=epochs,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        held_out=held_out,
        seed=seed,
    ):
        if done.step % 10 == 0 or done.step == done.steps:
            say(f"step {done.step}/{done.steps}  loss {done.loss:.4f}")
    table([{k: v if as_json else number(v) for k, v in asdict(score).items()} for score in saved_scores(output)], as_json)
    say(f"saved {output}")


benches = typer.Typer(help="What training costs beside TRL and DanceGRPO.", no_args_is_help=True)
app.add_typer(benches, name="bench")
Rounds = Annotated[int, typer.Option(help="Times that every side takes its turn.")]
Pages = Annotated[Path | None, typer.Option(help="A folder for the page and its numbers; printed alone when not given.")]


@benches.command(name="text")
def bench_text(
    work: Annotated[list[str] | None, typer.Option(help="As 1024/32 or 1024/32@24.7M; may be repeated; all by default.")] = None,
    rounds: Rounds = 3,
    out: Pages = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in processes of their own.")] = True,
) -> None:
    """Sampling, scoring and training beside TRL's GRPOTrainer on equal work; needs the extra `parity`."""
    from gruppo.bench import WORKS, report

    print(report(work or list(WORKS), rounds, out, memory=memory))


@benches.command(name="flow")
def bench_flow(
    rounds: Rounds = 5,
    out: Pages = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    paths: Annotated[int, typer.Option(help="Paths per prompt.")] = 16,
    prompts: Annotated[int, typer.Option(help="Prompts per iteration.")] = 2,
) -> None:
    """An iteration of the cheaper flow methods beside DanceGRPO's, on the world `glyphs`."""
    from gruppo.bench_flow import report

    print(report(steps, paths, prompts, rounds, out))


@app.command()
def record(recipe: Annotated[str, typer.Argument(help="arXiv id or nickname, or `all`.")]) -> None:
    """Train a recipe's tiny golden run again and write its curve into the repository."""
    from gruppo.recipes import RECIPES, find
    from gruppo.recipes.golden import write

    for entry in RECIPES.values() if recipe == "all" else [find(recipe)]:
        print(write(entry.arxiv))


def say(sentence: str) -> None:
    """Tell the person something beside the result."""
    print(sentence, file=sys.stderr, flush=True)


def number(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value


def table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows for a person, or the same as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0] if rows else ():
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text("" if v is None else str(v)) for v in row.values()))
    Console().print(out)


def main() -> None:
    """Run the command line: a sentence and exit code 1 for what the person can mend, typer's 2 for wrong usage."""
    words = [w for w in sys.argv[1:] if w != "--debug"]
    debug = len(words) < len(sys.argv) - 1
    quiet_libraries()
    try:
        app(args=words, prog_name="gruppo")
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: importing the class would import torch
        if debug or not kinds & {"GruppoError", "Interrupted"}:
            raise
        say(str(error) if "Interrupted" in kinds else f"error: {error}")
        sys.exit(getattr(error, "code", 1))


def quiet_libraries() -> None:
    """No progress bars and advice of other libraries between our own lines."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
