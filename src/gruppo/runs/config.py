"""One file describes a run. The schema is this module; unknown keys are refused with the nearest match.

Later beats earlier: the world's defaults, the file, the command line. The merged file is printed, saved as `run.yaml` in the
run folder, and running that file again repeats the run.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gruppo.types import GruppoError

Cell = str | int | float | bool
MERGED = ("recipe_args", "weights", "policy", "fit", "eval", "track")  # sections that merge key by key; all else is replaced


class Section(BaseModel):
    """A part of the file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Lora(Section):
    """A low-rank adapter by peft instead of full fine-tuning."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: str | list[str] = "all-linear"
    merge: bool = False  # checkpoints and the final model hold the merged weights beside the adapter


class EngineSection(Section):
    """Another program that samples for the trainer; `engine: vllm` alone takes every default."""

    name: Literal["vllm"] = "vllm"
    url: str | None = None  # of a server (python -m gruppo.policies.engines.vllm); without one it runs inside this process
    memory: float = Field(0.3, gt=0, lt=1)  # share of the device's memory, when inside
    timeout: float = Field(600.0, gt=0)  # seconds for one call: sampling a step, or taking weights
    dtype: Literal["float32", "bfloat16"] | None = None  # of the engine's weights; policy.dtype, or bfloat16 under autocast
    merge: bool = False  # hand over merged weights instead of an adapter
    correction: float | None = Field(2.0, gt=0)  # bound of exp(logp_trainer - logp_engine) on the loss; null: re-read only


class PolicySection(Section):
    """How the model is loaded, sampled and evaluated."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that are trained
    autocast: bool = False  # bfloat16 activations over float32 weights
    lora: Lora | None = None
    trained: list[str] | None = None  # beginnings of names of weights that train; its painter's choice or all if not given
    gradient_checkpointing: bool = False
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = 1.0
    device: str = "auto"  # cuda where there is one, else cpu
    threads: int | None = Field(None, ge=1)  # torch threads; measured at the start of the run when not given
    compile: bool = False  # the network of an image model by torch.compile; needs a C++ compiler on a CPU
    onednn: bool | None = None  # large float32 products of training on a CPU by oneDNN; where known to be faster if not given
    graphs: bool | None = None  # a text model decodes with fixed shapes, on CUDA by graphs; on CUDA alone if not given
    sample_rows: int = Field(256, ge=1)  # paths that decode together
    sample_tokens: int | None = Field(
        None, ge=1
    )  # places of the key-value cache for them, prompt and all; no bound when not given
    top_p: float | None = None
    top_k: int | None = None
    denoising_steps: int | None = Field(None, ge=1)  # of an image model while it trains
    eval_denoising_steps: int | None = Field(None, ge=1)  # while it is evaluated; as many as in training when not given
    guidance: float | None = Field(None, ge=0)  # classifier-free, or embedded where the network takes it so
    detach_unconditional: bool = False  # no gradient through the unconditional branch of classifier-free guidance
    size: tuple[int, int] | None = None  # height and width of the pictures; the pipeline's own when not given
    frames: int | None = Field(None, ge=1)  # of a video
    engine: EngineSection | None = None  # who samples; the trainer itself when not given

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_choice_of_weights(self) -> PolicySection:
        if self.lora is not None and self.trained is not None:
            raise GruppoError(
                f"policy.trained is {self.trained} and policy.lora is set, but beside an adapter no weight of the model trains; "
                "name the layers of the adapter with policy.lora.targets"
            )
        return self

    @model_validator(mode="after")
    def _whole_distribution(self) -> PolicySection:
        for name, value, neutral in (("top_p", self.top_p, (1.0,)), ("top_k", self.top_k, (0, -1))):
            if value is not None and value not in neutral:
                raise GruppoError(
                    f"policy.{name} is {value}, but log-probabilities here are of the full tempered distribution: sampling from "
                    f"a truncated one would make every ratio wrong; remove policy.{name}, or sharpen with policy.temperature"
                )
        if not self.temperature > 0:
            raise GruppoError(
                f"policy.temperature is {self.temperature}; training samples, so it must be above 0 (greedy decoding is measured "
                "by the evaluation anyway)"
            )
        return self


class AverageSection(Section):
    """A moving average of the trained weights, with which the run is evaluated.

    After every so many optimizer steps: average <- d average + (1 - d) weights, d = min((1 + n) / (slow + n), most), where n
    optimizer steps were taken before. The defaults are those of yifan123/flow_grpo; the paper (2505.05470) names none.
    """

    most: float = Field(0.9, ge=0, lt=1)
    slow: float = Field(10.0, ge=1)
    every: int = Field(8, ge=1)


class MomentsSection(Section):
    """AdamW's two moments as bitsandbytes keeps them (extra `lowbit`); `fit.moments={}` for 8 bits.

    8 bits: blocks of 256 numbers with a scale each; tensors of fewer than 4096 numbers stay in float32. A run that resumes goes
    on bit for bit.
    """

    bits: Literal[8, 32] = 8
    paged: bool = False  # on CUDA: moved to the host while the device's memory is short; 32 bits paged changes no number


class FitSection(Section):
    """How much is sampled and how the optimizer moves."""

    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    paths_per_prompt: int = 8
    learning_rate: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_to: float | None = Field(None, ge=0, le=1)  # cosine to this fraction of the learning rate at the last step
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    skip_grad_norm: float | None = Field(None, gt=0)  # an optimizer step whose gradient norm reaches this is left out
    moments: MomentsSection | None = None  # AdamW's moments in fewer bits; torch's own in float32 when not given
    ema: AverageSection | None = None  # evaluate a moving average of the weights; `fit.ema={}` for its defaults
    epochs: int | None = Field(None, ge=1)  # passes over each step's paths; the recipe's own when not given
    updates_per_epoch: int | None = Field(None, ge=1)  # optimizer steps per pass
    token_budget: int = Field(8192, ge=1)  # tokens per forward and backward; changes memory, never the gradient
    sync_every: int = 1  # iterations between two transfers of the trained weights to the sampler
    sync_lag: int = 0  # iterations that the weights are old when they arrive
    seed: int = 0

    @field_validator("sync_every")
    @classmethod
    def _sent(cls, n: int) -> int:
        if n < 1:
            raise GruppoError(f"fit.sync_every is {n}; the sampler gets new weights every so many iterations, at least every 1")
        return n

    @field_validator("sync_lag")
    @classmethod
    def _late(cls, n: int) -> int:
        if n < 0:
            raise GruppoError(f"fit.sync_lag is {n}; the sampler's weights cannot be newer than the trainer's, so at least 0")
        return n

    @field_validator("paths_per_prompt")
    @classmethod
    def _siblings(cls, n: int) -> int:
        if n < 2:
            raise GruppoError(
                f"fit.paths_per_prompt is {n}; a group needs at least 2 paths, because a path is only ever compared with its "
                "siblings"
            )
        return n


class EvalSection(Section):
    """The held-out problems and how often they are tried."""

    data: str | None = None  # a file of its own; otherwise a fixed share of the data, or the world's held-out set
    share: float = Field(0.1, ge=0, lt=1)  # of the distinct prompts of `data`, chosen by a hash of the prompt
    tasks: int = Field(128, ge=0)  # at most; 0 evaluates nothing
    samples: int = Field(4, ge=1)
    greedy: bool = True
    every: int = Field(0, ge=0)  # steps between evaluations; 0 = before and after only
    by: list[str] = ["difficulty"]


class TrackSection(Section):
    """What the run folder keeps."""

    save_every: int = Field(50, ge=0)  # steps between checkpoints; the last step is always saved
    keep_last: int = Field(2, ge=1)
    groups_every: int = Field(10, ge=0)  # steps between saved groups; 0 = never
    show_every: int = Field(10, ge=0)  # steps between completions in the terminal
    report: bool = True
    to: list[str] = []  # trackers beside the run folder: trackio, wandb, tensorboard


class StagePolicy(Section):
    max_new_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None


class Stage(Section):
    """Overrides for a part of the run; each stage lasts `fit.steps` steps of its own."""

    recipe: str | None = None
    recipe_args: dict[str, Any] = {}
    data: str | None = None
    only: dict[str, list[Cell] | Cell] | None = None
    rewards: list[str] | None = None
    weights: dict[str, float] | list[float] | None = None
    policy: StagePolicy = StagePolicy.model_construct()
    fit: dict[str, Any] = {}


class RunConfig(Section):
    """A whole run. Either `world`, or `model` + `data` + `rewards`."""

    recipe: str = "grpo"
    recipe_args: dict[str, Any] = {}
    world: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    only: dict[str, list[Cell] | Cell] | None = None  # keep only the tasks whose column has (one of) these values
    offline: list[str] = []  # stored groups to train on instead of sampling: files, folders of them, or runs
    rewards: list[str] = []  # module:function, file.py:function, or the folder of a reward model
    weights: dict[str, float] | list[float] = {}  # by signal, or one per reward
    policy: PolicySection = PolicySection.model_construct()
    fit: FitSection = FitSection.model_construct()
    stages: list[Stage] = []
    eval: EvalSection = EvalSection.model_construct()
    track: TrackSection = TrackSection.model_construct()
    name: str | None = None
    folder: str = "runs"

    @model_validator(mode="after")
    def _complete(self) -> RunConfig:
        if self.offline:
            self._stored()
        elif self.world is None:
            missing = [k for k in ("model", "data", "rewards") if not getattr(self, k)]
            if missing:
                raise GruppoError(
                    f"the run names no world and lacks {' and '.join(missing)}: give --world NAME, or all of --model PATH, "
                    "--data FILE and --reward module:function"
                )
        if "n" in self.recipe_args:
            raise GruppoError(
                f"recipe_args.n is {self.recipe_args['n']}, but the number of paths is given once, as fit.paths_per_prompt "
                f"({self.fit.paths_per_prompt})"
            )
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise GruppoError(f"the run's name {self.name!r} would make a strange folder; use letters, digits, '.', '_' and '-'")
        for stage in range(len(self.stages)):
            if "ema" in self.stages[stage].fit:
                raise GruppoError(
                    f"stage {stage + 1} sets fit.ema, but the moving average goes on over all stages; set it for the whole run"
                )
            if "moments" in self.stages[stage].fit:
                raise GruppoError(
                    f"stage {stage + 1} sets fit.moments, but one optimizer goes on over all stages; set it for the whole run"
                )
            self.at(stage)
        return self

    def _stored(self) -> None:
        """What a run on stored groups needs, and what would have no effect in it."""
        if self.world is None and not self.model:
            raise GruppoError("training on stored groups needs the model that is trained: give --model PATH, or --world NAME")
        if self.data:
            raise GruppoError(
                f"the prompts come with the stored groups, so data {self.data} would not be used; held-out problems are eval.data"
            )
        if self.fit.sync_every != 1 or self.fit.sync_lag:
            raise GruppoError("nothing is sampled while training on stored groups; remove fit.sync_every and fit.sync_lag")
        if self.eval.data and not self.rewards and self.world is None:
            raise GruppoError(f"completions of eval.data {self.eval.data} need a grade: give --reward module:function")
        if isinstance(self.weights, list) and self.weights and not self.rewards:
            raise GruppoError("the weights are a list, but stored signals have names; write them as name: number")

    def at(self, stage: int) -> RunConfig:
        """The run as it is in one stage; without stages, the run itself."""
        if not self.stages:
            return self
        change = self.stages[stage].model_dump(exclude_unset=True)
        own = {**self.model_dump(), "stages": []}
        if change.get("recipe") not in (None, self.recipe):
            own["recipe_args"] = {}  # another recipe's numbers mean something else
        return validate(merge(own, change), f"stage {stage + 1}")

    @property
    def ends(self) -> list[int]:
        """The step after which each stage is over; the last one is the run's length."""
        total, out = 0, []
        for stage in range(max(1, len(self.stages))):
            total += self.at(stage).fit.steps
            out.append(total)
        return out


def validate(values: Mapping[str, Any], where: str = "the run") -> RunConfig:
    """A RunConfig, or one sentence about the first thing that is wrong."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise GruppoError(sentence(error, where)) from None


def sentence(error: ValidationError, where: str) -> str:
    """The first complaint as a sentence with the offending value, and the nearest match for an unknown key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = keys_of(RunConfig)
        return f"{where} has the unknown key {path!r}; {nearest(path, known)}"
    return f"{path} in {where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?', or the list to choose from."""
    known = list(known)
    leaf = word.rpartition(".")[2]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = [by_leaf[leaf]] if leaf in by_leaf else []  # the right name in the wrong section, or without one
    close = close or difflib.get_close_matches(word, known, 1, 0.6)
    close = close or [by_leaf[hit] for hit in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)]
    if close:
        return f"did you mean {close[0]!r}?"
    section = word.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == section] or known
    return f"known here: {', '.join(siblings)}"


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    out = []
    for name, f in section.model_fields.items():
        out.append(prefix + name)
        for inner in (f.annotation, *getattr(f.annotation, "__args__", ())):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                out += keys_of(inner, f"{prefix}{name}.")
    return out


class _Loader(yaml.SafeLoader):
    pass


# PyYAML follows YAML 1.1, where `1e-6` is a string; a learning rate written so must be a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in out:
            raise GruppoError(f"the key {key!r} stands twice, the second time in line {key_node.start_mark.line + 1}; keep one")
        out[key] = loader.construct_object(value_node, deep=True)
    return out


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """YAML in which 1e-6 is a number and a key stands once."""
    return yaml.load(text, Loader=_Loader)


def read(file: Path) -> dict[str, Any]:
    """The mapping in a run file."""
    try:
        text = file.read_text()
    except OSError as error:
        raise GruppoError(f"cannot read the run file {file}: {error.strerror}") from None
    try:
        values = parse(text)
    except yaml.YAMLError as error:
        raise GruppoError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise GruppoError(f"{file} holds a {type(values).__name__}; a run file is a mapping such as `recipe: grpo`")
    return values


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """`fit.steps=10 policy.temperature=0.8` as nested dictionaries; values are YAML."""
    out: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise GruppoError(f"{word!r} is not a setting; write section.key=value, for example fit.steps=10")
        try:
            value = parse(text)
        except yaml.YAMLError:
            raise GruppoError(f"the value in {word!r} is not YAML; quote it, for example name='\"a: b\"'") from None
        at = out
        *sections, leaf = key.split(".")
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise GruppoError(f"{word!r} sets a part of {section!r}, which another setting already gave as a whole")
        at[leaf] = value
    return out


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, key by key where both hold a section."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        out[key] = merge(below, value) if both and isinstance(below, Mapping) else value
    return out


def assemble(*layers: Mapping[str, Any]) -> RunConfig:
    """World defaults, then each layer in order; `gruppo train` with nothing at all is GRPO on arithmetic."""
    given: dict[str, Any] = {}
    for layer in layers:
        given = merge(given, layer)
    if not any(given.get(key) for key in ("world", "model", "data")):
        given = {"world": "arithmetic", **{k: v for k, v in given.items() if k != "world"}}
    if isinstance(given.get("world"), str):
        from gruppo.worlds import WORLDS

        if given["world"] not in WORLDS:
            raise GruppoError(f"there is no world {given['world']!r}; {nearest(given['world'], WORLDS)}")
        world = WORLDS[given["world"]]
        given = {"recipe": world.recipe, **given}
        defaults = {k: dict(v) for k, v in world.defaults.items()}
        suited = defaults.get("recipe_args", {})
        taken = arguments(str(given.get("recipe", "grpo")))
        defaults["recipe_args"] = {k: v for k, v in suited.items() if k in taken}
        given = merge(defaults, given)
    config = validate(given)
    for stage in range(max(1, len(config.stages))):
        check_arguments(config.at(stage))
    return config


def arguments(recipe: str) -> dict[str, Any]:
    """The numbers a recipe takes, with their defaults; a sentence with the nearest match for an unknown recipe."""
    from gruppo.recipes import find

    return find(recipe).numbers


def _family(recipe: str) -> str:
    from gruppo.recipes import find

    return find(recipe).family


def check_arguments(config: RunConfig) -> None:
    """A sentence for a recipe argument that the recipe does not take."""
    if config.recipe.endswith(".pickle"):
        return
    known = [name for name in arguments(config.recipe) if name != "n"]
    for name in config.recipe_args:
        if name not in known:
            raise GruppoError(f"the recipe {config.recipe} takes no number {name!r}; {nearest(name, known)}")


def dump(config: RunConfig) -> str:
    """The resolved file as YAML, in the schema's order."""
    values = config.model_dump(mode="json")
    values["policy"] = {k: v for k, v in values["policy"].items() if v is not None or k not in ("top_p", "top_k", "engine")}
    values["stages"] = [stage.model_dump(mode="json", exclude_unset=True) for stage in config.stages]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def derived(config: RunConfig) -> dict[str, str]:
    """What follows from the numbers given, to be read before the run starts."""
    out = {}
    for stage in range(max(1, len(config.stages))):
        fit, policy = config.at(stage).fit, config.at(stage).policy
        rows = fit.prompts_per_step * fit.paths_per_prompt
        updates = (fit.epochs or 1) * (fit.updates_per_epoch or 1)
        own = "" if fit.epochs or fit.updates_per_epoch else " (unless the recipe says otherwise)"
        if config.offline:
            out[f"stage {stage + 1}" if config.stages else "run"] = (
                f"{fit.steps} steps of {fit.prompts_per_step} stored groups, {updates} optimizer step{'s' * (updates > 1)} per "
                f"step{own}; nothing is sampled"
            )
            continue
        oldest = fit.sync_every - 1 + fit.sync_lag
        painted = not config.recipe.endswith(".pickle") and _family(config.at(stage).recipe) == "image"
        most = (
            f"{rows} pictures of {policy.denoising_steps or 10} steps"
            if painted
            else (f"{rows} rows, at most {rows * policy.max_new_tokens} sampled tokens")
        )
        age = f", sampled with weights {fit.sync_lag} to {oldest} steps old" if oldest else ""
        out[f"stage {stage + 1}" if config.stages else "run"] = (
            f"{fit.steps} steps of {fit.prompts_per_step} prompts x {fit.paths_per_prompt} paths = "
            f"{most}, {updates} optimizer step{'s' * (updates > 1)} per step{own}{age}"
        )
    return out
