"""Rank-GRPO: worked numbers, ranks that are trained where they were scored, the end, the overflow, both aggregations."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_tokenizer

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.kl import WithKL
from gruppo.core.reduce import step_mean, weigh
from gruppo.graders.ranking import Ranking
from gruppo.recipe import check_needs
from gruppo.recipes.rank_grpo import (
    ExpGamma,
    PerRank,
    RankMean,
    RankReward,
    exp_inf,
    log_decay,
    per_rank,
    rank_grpo,
)
from gruppo.rollouts import Parallel
from gruppo.rollouts.segmented import Pieces, Segmented, ranked, scored, starts
from gruppo.types import Batch, Group, GruppoError, Path, Steps, Task
from gruppo.worlds.tokenizer import tokenizer as byte_tokenizer

HITS = torch.tensor([[0.0, 1, 0, 1]])
FOUR = [[0.0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
CATALOG = {(t, 1990) for t in "ABCDE"}
CHARACTERS = tiny_tokenizer()


def decode(ids) -> str:
    return CHARACTERS.decode(ids.tolist(), skip_special_tokens=True)


def path(text: str, *, ended: bool = True, words=CHARACTERS) -> Path:
    """One token per character, and the end token."""
    ids = torch.tensor([*words(text)["input_ids"], *([words.eos_token_id] if ended else [])])
    ones = torch.ones(len(ids), dtype=torch.bool)
    return Path(torch.tensor([5]), ids, torch.full((len(ids),), -0.5), ones, text, truncated=not ended)


def lists(*texts: str, ranks: int = 3, truths="ABC", ended: bool = True) -> Group:
    """Graded and segmented paths."""
    group = Group(Task("q", answer=[(t, 1990) for t in truths]), [path(t, ended=ended) for t in texts])
    group = group.with_(signals=Ranking(CATALOG, ranks=ranks).one(group))
    return Segmented(Parallel(2), ranks).cut(group, decode)


def listed(titles: str) -> str:
    return "\n".join(f"{t} (1990)" for t in titles)


def judged(recipe, group: Group) -> Group:
    group = drop_abstained(group.with_(reward=recipe.reward(group)))
    return group.with_(advantage=recipe.advantage(group))


def texts_of(group: Group, row: int) -> dict[int, str]:
    """The text that each unit trains."""
    unit, p = group.paths[row].unit, group.paths[row]
    assert unit is not None
    return {k: decode(p.steps[unit == k]) for k in sorted(set(unit.tolist()))}


# ---- worked numbers


def test_dcg_from_each_rank_down() -> None:
    assert log_decay(HITS)[0].tolist() == pytest.approx([1.061606, 1.061606, 0.430677, 0.430677], abs=2e-6)


def test_each_rank_earns_its_own_hit() -> None:
    assert exp_inf(HITS)[0].tolist() == [0, 1, 0, 1]


def test_hits_halved_from_rank_to_rank() -> None:
    assert ExpGamma(2.0)(HITS)[0].tolist() == [0.625, 1.25, 0.5, 1.0]
    assert torch.allclose(ExpGamma(1e9)(HITS), exp_inf(HITS))
    with pytest.raises(GruppoError, match="Gamma is"):
        ExpGamma(0.5)


def test_each_rank_is_standardised_by_itself() -> None:
    unit = torch.arange(4)
    paths = [Path(torch.tensor([5]), unit, torch.zeros(4), torch.ones(4, dtype=torch.bool), "", unit=unit) for _ in FOUR]
    group = Group(Task("q"), paths, reward=torch.tensor(FOUR))
    A = PerRank(4, None, None, 0.0, ddof=1, eps=1e-4)(group)
    expected = [
        [-0.4999, 1.4997, -0.4999, -0.4999],
        [0.4999, 0.4999, -1.4997, 0.4999],
        [0, 0, 0, 0],
        [0.865875, -0.865875, 0.865875, -0.865875],
    ]
    assert torch.allclose(A, torch.tensor(expected).T, atol=2e-6)


def batch(*units: list[int]) -> Batch:
    paths = [
        Path(torch.tensor([5]), torch.tensor(u), torch.zeros(len(u)), torch.ones(len(u), dtype=torch.bool), unit=torch.tensor(u))
        for u in units
    ]
    group = Group(Task("q"), paths)
    return collate([group.with_(advantage=torch.ones(len(group), group.width))])


def test_the_two_aggregations() -> None:
    loss = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0]])
    for reduce, expected in ((RankMean(3), 1 / 3), (step_mean, 2 / 7)):
        b = weigh(batch([0, 0, 1, 1, 1, 2, 2]), reduce)
        assert float((b.weight * loss).sum()) == pytest.approx(expected, abs=1e-6)


def test_a_missing_rank_adds_nothing_to_the_mean_over_ranks() -> None:
    b = weigh(batch([0, 0, 1], [0, 1, 2]), RankMean(3))
    assert b.weight.tolist()[0] == pytest.approx([1 / 12, 1 / 12, 1 / 6])
    assert float(b.weight.sum()) == pytest.approx(5 / 6)


def test_text_without_a_rank_has_no_weight_in_the_mean_over_ranks() -> None:
    assert weigh(batch([-1, 0, 1]), RankMean(2)).weight.tolist()[0] == pytest.approx([0, 0.5, 0.5])


def test_the_ratio_is_the_geometric_mean_of_a_rank() -> None:
    b = batch([0, 0, 1])
    loss, stats = PPO(rank_grpo(beta=0.0), b, torch.tensor([[1.2, 1.0, 0.97]]).log())
    assert stats["ratio"][0].tolist() == pytest.approx([1.2**0.5, 1.2**0.5, 0.97])
    assert stats["clip_high"][0].tolist() == [1, 1, 0]  # 1.0954 > 1.08; the single step 1.0 would not be clipped
    assert loss[0].tolist() == pytest.approx([-1.08, -1.08, -0.97])


def PPO(recipe, b: Batch, logp):
    return recipe.loss(b, Steps(logp=logp), None)


# ---- the spans the reward scored are the spans that are trained


def test_blank_lines_do_not_shift_the_ranks() -> None:
    group = lists("A (1990)\n\nB (1990)\nC (1990)")
    assert group.signals["hits"][0].tolist() == [1, 1, 1]
    assert texts_of(group, 0) == {0: "A (1990)\n\n", 1: "B (1990)\n", 2: "C (1990)"}


def test_every_hit_is_credited_to_the_tokens_that_were_read() -> None:
    recipe = rank_grpo(n=2, ranks=3, end=None, early=None)
    group = judged(recipe, lists("\nE (1990)\n\n\nnot an item\nB (1990)\n\nD (1990)", listed("EDE")))
    assert group.signals["hits"][0].tolist() == [0, 1, 0]
    row = group.advantage[0]
    text = group.paths[0].output
    credited = "".join(c for c, a in zip(text, row.tolist()) if a > 0)
    assert credited == "B (1990)\n\n"


def test_a_line_that_is_no_item_is_not_trained_by_any_rank() -> None:
    group = lists("So:\nA (1990)\nhm\nB (1990)")
    assert texts_of(group, 0) == {-1: "So:\nhm\n", 0: "A (1990)\n", 1: "B (1990)"}


def test_the_line_end_behind_the_last_item_is_no_overflow() -> None:
    recipe = rank_grpo(n=2, ranks=3)
    group = judged(recipe, lists(listed("ABC") + "\n", listed("ABC")))
    assert group.paths[0].unit.max() == 2
    assert float(group.advantage[0, len(group.paths[0]) - 1]) == pytest.approx(0.1)


def test_anything_behind_the_last_rank_is_overflow() -> None:
    for more in ("D (1990)", "enjoy!"):
        group = lists(listed("ABC") + "\n" + more)
        assert texts_of(group, 0)[3] == more
        assert int(group.paths[0].unit[-1]) == 3


def test_the_end_token_goes_with_the_rank_before_it() -> None:
    assert int(lists(listed("AB")).paths[0].unit[-1]) == 1
    assert int(lists(listed("AB") + "\nhm").paths[0].unit[-1]) == 1
    assert lists("").paths[0].unit.tolist() == [0]


def test_text_without_items_is_pushed_down_as_the_first_rank() -> None:
    recipe = rank_grpo(n=2, ranks=3, end=None, early=None)
    group = judged(recipe, lists("no idea", listed("ABC")))
    assert (group.advantage[0, :8] < -0.7).all()


def test_a_token_over_a_border_belongs_to_the_rank_it_ends() -> None:
    # tokens "ab", "\ncd", "e"; items "ab\n" and "cde"
    assert ranked([0, 2, 5], [(0, 3), (3, 6)], 6, 4).tolist() == [0, 0, 1]


def test_bytes_of_one_character_stay_in_their_rank() -> None:
    words = byte_tokenizer()
    p = path("é (1990)\nB (1990)", words=words)
    begins = starts(p, lambda ids: words.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert begins[:4] == [0, 0, 1, 2]
    unit = ranked(begins, [(0, 9), (9, 17)], 17, 2).tolist()
    assert unit == [0] * 10 + [1] * 9


def test_tokens_stay_the_ones_that_were_sampled() -> None:
    before = path(listed("AB"))
    after = lists(listed("AB")).paths[0]
    assert torch.equal(before.steps, after.steps)
    assert torch.equal(before.logp, after.logp)
    assert torch.equal(before.mask, after.mask)


def test_a_text_that_is_not_its_tokens_is_refused() -> None:
    p = path("abc")
    p.output = "xyz"
    with pytest.raises(GruppoError, match="does not read as its tokens do"):
        starts(p, decode)


def test_pieces_cut_text_without_separators() -> None:
    group = Segmented(Parallel(2), 2, Pieces(2)).cut(Group(Task("q"), [path("abcdef"), path("")]), decode)
    assert group.paths[0].unit.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert group.paths[1].unit.tolist() == [0]


# ---- the end and the overflow


@pytest.mark.parametrize(("titles", "expected"), [("ABC", 0.1), ("AB", -0.1), ("ABCD", -0.1)])
def test_the_end_is_judged_apart(titles: str, expected: float) -> None:
    group = judged(rank_grpo(n=2, ranks=3), lists(listed(titles), listed("EAB")))
    assert float(group.advantage[0, len(group.paths[0]) - 1]) == pytest.approx(expected)


def test_the_end_is_not_scaled_by_the_std() -> None:
    group = judged(rank_grpo(n=2, ranks=3, end=0.7, early=-0.3), lists(listed("ABC"), listed("AB")))
    ends = [float(group.advantage[i, len(p) - 1]) for i, p in enumerate(group.paths)]
    assert ends == pytest.approx([0.7, -0.3])


def test_only_the_end_token_is_replaced() -> None:
    a = judged(rank_grpo(n=2, ranks=3), lists(listed("AEC"), listed("EBE"))).advantage
    b = judged(rank_grpo(n=2, ranks=3, end=None), lists(listed("AEC"), listed("EBE"))).advantage
    assert (a != b).nonzero().tolist() == [[0, 26], [1, 26]]


def test_every_overflow_token_gets_its_own_advantage() -> None:
    group = judged(rank_grpo(n=2, ranks=3, overflow=-0.4), lists(listed("ABCDE"), listed("ABC")))
    beyond = group.paths[0].unit == 3
    assert int(beyond.sum()) == 18
    assert group.advantage[0][beyond].tolist() == pytest.approx([-0.4] * 18)


def test_a_truncated_list_has_no_end_to_judge() -> None:
    group = judged(rank_grpo(n=2, ranks=3), lists(listed("ABC"), listed("EDE"), ended=False))
    assert float(group.advantage[0, -1]) == pytest.approx(0.707, abs=1e-3)


# ---- rewards


def test_a_rank_that_nobody_or_everybody_finds_teaches_nothing() -> None:
    group = judged(rank_grpo(n=2, ranks=3, end=None), lists(listed("ABE"), listed("AEE")))
    A, unit = group.advantage[0], group.paths[0].unit
    assert not A[unit == 0].any()
    assert not A[unit == 2].any()
    assert (A[unit == 1] > 0).all()


def test_a_rank_that_a_list_lacks_counts_as_no_hit_there() -> None:
    group = judged(rank_grpo(n=2, ranks=3, end=None, early=None), lists(listed("ABC"), listed("AB")))
    assert (group.advantage[0][group.paths[0].unit == 2] > 0.7).all()
    assert not group.advantage[1].any()


def test_another_number_of_ranks_than_the_graders_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="ranks = 20, but the grader judges 3"):
        RankReward(20, exp_inf)(lists(listed("AB")))


def test_one_number_per_path_is_every_ranks() -> None:
    group = Group(Task("q"), [path("a"), path("b")], {"reward": torch.tensor([1.0, 0.0])})
    assert RankReward(3, exp_inf, "reward")(group).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_an_abstained_list_is_dropped() -> None:
    group = lists(listed("ABC"), listed("AB"), listed("E"))
    group.signals["hits"] = torch.stack([torch.as_tensor(h) for h in group.signals["hits"]])
    group.signals["hits"][0] = torch.nan
    done = judged(rank_grpo(n=2, ranks=3), group)
    assert not done.paths[0].mask.any()
    assert done.advantage.isfinite().all()


def test_stored_hits_are_lists_of_numbers() -> None:
    group = lists(listed("ABC"), listed("AB"))
    group.signals["hits"] = [[1.0, 1, 1], [1.0, 1, 0]]
    assert RankReward(3, exp_inf)(group).tolist() == [[1, 1, 1], [1, 1, 0]]


# ---- the recipe


def test_a_run_without_hits_stops_before_it_trains() -> None:
    with pytest.raises(GruppoError, match="hits"):
        check_needs(rank_grpo(), [Task("q")], [Group(Task("q"), [path("a")], {"reward": torch.zeros(1)})])
    with pytest.raises(GruppoError, match="no signal 'spans'"):
        scored(Group(Task("q"), [path("a")], {"reward": torch.zeros(1)}))


def test_the_papers_aggregation_is_a_number_of_the_recipe() -> None:
    assert rank_grpo().reduce is step_mean
    assert rank_grpo(ranks=7, weighing=per_rank).reduce == RankMean(7)


def test_the_defaults() -> None:
    recipe = rank_grpo()
    assert isinstance(recipe.loss, WithKL)
    assert recipe.loss.beta == 1e-3
    assert (recipe.loss.loss.low, recipe.loss.loss.high) == (0.06, 0.08)  # type: ignore[attr-defined]
    assert recipe.advantage == PerRank(20, 0.1, -0.1, -0.1, ddof=1, eps=1e-4)
