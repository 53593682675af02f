"""Decoding with fixed shapes gives what the ordinary rows give, at addresses that stay, and is recorded once per shape.

No graph of CUDA is recorded here. `Frozen` stands in for one: it keeps the kernels of a step, with the very tensors and numbers
they were called with, and calls them again.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from tests.policies.models import gap, gemma3, policy_of, ragged, rng
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gruppo.policies import graphs
from gruppo.policies.decode import Rows
from gruppo.policies.graphs import GraphRows, Step
from gruppo.policies.load import lora_config, with_adapter
from gruppo.policies.reference import swapped
from gruppo.policies.token import TokenPolicy
from gruppo.runs.build import build_policy
from gruppo.runs.config import RunConfig
from gruppo.types import GruppoError

NONE = torch.empty(0, dtype=torch.long)


class Frozen:
    """Keeps what a step called, and on which tensors."""

    def __init__(self) -> None:
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm(self, step: Step) -> Tensor:
        self.warmed += 1
        return step()

    def record(self, step: Step) -> Step:
        kernels = make_fx(step)()
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return kernels()

        return replay


class Plain(Frozen):
    """Calls the step itself again: for what depends on the count alone."""

    def record(self, step: Step) -> Step:
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return step()

        return replay


class Broken(Frozen):
    def record(self, step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")


def fixed(policy: TokenPolicy, most: int = 200, recorder: Any = None, warm: int = 1) -> GraphRows:
    return GraphRows(policy, True, most, recorder, warm=warm)


def paths(policy: TokenPolicy, prompts: list[Tensor], seed: int = 0, **numbers: Any):
    return policy.sample(prompts, g=rng(seed), **numbers)


def assert_same(found, own) -> None:
    assert [p.steps.tolist() for p in found] == [p.steps.tolist() for p in own]
    for a, b in zip(found, own):
        torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)


def both(family: str, **numbers: Any) -> tuple[TokenPolicy, TokenPolicy]:
    return policy_of(family, graphs=True, **numbers), policy_of(family, graphs=False, lean=False, **numbers)


def course(rows: Rows | GraphRows) -> Tensor:
    """Log-probabilities while rows of ragged prompts enter, decode, leave and are followed by others."""
    a, b, c, d = ragged()
    out = [rows.enter(NONE, [a, b, a, b, c, d], hold=True)]
    draw = rng(7)

    def go(n: int, times: int) -> None:
        out.extend(rows.step(torch.randint(5, 59, (n,), generator=draw)) for _ in range(times))

    go(6, 2)
    rows.keep(torch.tensor([0, 1, 2, 5, 4]))  # too many for half of the places
    go(5, 2)
    out.append(rows.enter(torch.tensor([1, 4]), [d, d, c, b], hold=False))  # d was held
    go(6, 60)  # more than the first columns
    rows.keep(torch.tensor([0, 5]))
    go(2, 2)
    return torch.cat(out).log_softmax(-1)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_log_probability_is_that_of_the_ordinary_rows(family):
    policy = policy_of(family)
    with torch.no_grad():
        own, found = course(Rows(policy, True)), course(fixed(policy))
    assert float((own - found).abs().max()) < 1e-5
    assert float(own.std()) > 0.5


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("room", [{}, {"sample_rows": 5}, {"sample_tokens": 300}], ids=["all", "rows", "tokens"])
def test_the_same_seed_draws_the_same_tokens(family, room):
    policy, own = both(family, max_new=70, **room)
    prompts = [p for p in ragged() for _ in range(4)]
    found = paths(policy, prompts)
    assert policy.graphs_agree
    assert_same(found, paths(own, prompts))
    assert policy.counts == own.counts
    assert gap(policy, found, 1.0) < 1e-5


def test_greedy_tokens_are_the_same():
    policy, own = both("qwen3", max_new=20)
    found, wanted = (paths(p, ragged(), temperature=0.0) for p in (policy, own))
    assert [p.steps.tolist() for p in found] == [p.steps.tolist() for p in wanted]


def test_changed_weights_change_the_next_call():
    policy, own = both("qwen3")
    before = paths(policy, ragged())
    for p in (policy, own):
        with torch.no_grad():
            for w in p.model.parameters():
                w.add_(0.1 * torch.randn(w.shape, generator=rng(w.numel())))
    after = paths(policy, ragged())
    assert_same(after, paths(own, ragged()))
    assert [p.steps.tolist() for p in after] != [p.steps.tolist() for p in before]


def test_an_adapter_decodes_the_same():
    model = with_adapter(tiny_model("qwen3"), lora_config(4, 8.0, ["q_proj", "up_proj"]), 0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "lora_B" in name:
                w.normal_(std=0.2, generator=rng(1))
    policy, own = (TokenPolicy(model, tiny_tokenizer(), max_new=12, graphs=on, lean=False) for on in (True, False))
    assert_same(paths(policy, ragged()), paths(own, ragged()))
    assert policy.graphs_agree


# -- addresses ------------------------------------------------------------------------------------------------------------


def addresses(rows: GraphRows) -> list[int]:
    return [x.data_ptr() for x in (rows.token, rows.column, rows.place, *(room for layer in rooms(rows) for room in layer))]


def rooms(rows: GraphRows) -> list[tuple[Tensor, ...]]:
    return [layer.rooms for layer in rows.cache.layers]  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def test_buffers_keep_their_addresses_until_columns_or_rows_are_used_up():
    a, b, c, _ = ragged()
    rows = fixed(policy_of("qwen3"))
    rows.enter(NONE, [a, b, a, b, c], hold=False)
    here = addresses(rows)
    for _ in range(50):
        rows.step(torch.full((len(rows.at),), 7))
        assert addresses(rows) == here
        if int(rows.size.max()) == 20:
            rows.keep(torch.tensor([1, 2, 4]))
            assert rows.rows == 4
        if int(rows.size.max()) == 40:
            rows.enter(torch.tensor([0, 2]), [c] * 6, hold=False)
            assert rows.rows == 8
    assert (rows.rows, rows.columns) == (8, 64)
    for _ in range(10):
        rows.step(torch.full((8,), 7))
    assert rows.columns == 128
    assert addresses(rows) != here


def test_columns_double_up_to_what_a_row_may_need():
    rows = fixed(policy_of("qwen3"), most=300)
    assert [rows._columns(n) for n in (1, 64, 65, 128, 129, 257, 300)] == [64, 64, 128, 128, 256, 304, 304]


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        ({}, [1, 2, 4, 8, 256]),
        ({"sample_rows": 6}, [1, 2, 4, 6, 200]),
        ({"sample_tokens": 1000}, [1, 2, 4, 5, 200]),
    ],
)
def test_rows_are_a_power_of_two_within_the_policys_bounds(bounds, found):
    rows = fixed(policy_of("qwen3", **bounds), most=200)
    assert [rows._rows(n) for n in (1, 2, 3, 5, 200)] == found


@torch.no_grad()
def test_a_row_that_ended_may_run_on_beyond_its_columns():
    policy = policy_of("qwen3")
    a, b, _, _ = ragged()
    rows, own = fixed(policy, most=16), Rows(policy, True)
    said = [kind.enter(NONE, [a, b], hold=False) for kind in (rows, own)]  # 3 and 11 tokens: the second one's end at 16
    for _ in range(12):
        said = [kind.step(torch.tensor([7, 7])) for kind in (rows, own)]
        torch.testing.assert_close(said[0][0], said[1][0], atol=1e-5, rtol=0)
    assert rows.columns == 16
    assert said[0].isfinite().all()


@torch.no_grad()
def test_what_a_row_left_behind_does_not_reach_the_next_one():
    policy = policy_of("qwen3")
    a, b, c, _ = ragged()
    rows, own = fixed(policy), Rows(policy, True)
    for kind in (rows, own):
        kind.enter(NONE, [b, a], hold=False)
        kind.step(torch.tensor([7, 7]))
    for keys, values in rows.rooms:
        keys[0].fill_(float("nan"))
        values[0].fill_(float("nan"))
    found, wanted = (kind.enter(torch.tensor([1]), [c], hold=False) for kind in (rows, own))
    torch.testing.assert_close(found, wanted)
    found, wanted = (kind.step(torch.tensor([7, 8])) for kind in (rows, own))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# -- recording ------------------------------------------------------------------------------------------------------------


def test_a_recorded_step_is_all_that_a_step_needs():
    """Frozen kernels, from rows entering to leaving: whatever a step took from elsewhere would be left as it was."""
    policy, frozen = policy_of("qwen3", onednn=False), Frozen()
    with torch.no_grad():
        own, found = course(Rows(policy, True)), course(fixed(policy, recorder=frozen))
    assert float((own - found).abs().max()) < 1e-5
    assert frozen.recorded == 3  # 8 rows in 64 and 128 columns, 2 rows in 128; weights are where they were
    assert frozen.replayed == 63
    assert frozen.warmed == 3


@torch.no_grad()
def test_a_step_is_replayed_once_and_recorded_after_the_steps_that_warm_up():
    plain = Plain()
    rows = fixed(policy_of("qwen3"), recorder=plain, warm=3)
    rows.enter(NONE, ragged(), hold=False)
    seen = []
    for _ in range(6):
        rows.step(torch.full((4,), 7))
        seen.append((plain.warmed, plain.recorded, plain.replayed))
    assert seen == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 1, 1), (3, 1, 2), (3, 1, 3)]
    rows.keep(torch.tensor([0, 1, 3]))  # a dead row stays
    rows.step(torch.full((3,), 7))
    assert (plain.warmed, plain.recorded, plain.replayed) == (3, 1, 4)


@torch.no_grad()
def test_buffers_that_moved_are_recorded_again():
    policy, frozen = policy_of("qwen3", onednn=False), Frozen()
    rows, own = fixed(policy, recorder=frozen), Rows(policy, True)
    a, b, c, d = ragged()

    def same(n: int) -> None:
        found, wanted = (kind.step(torch.full((n,), 7)) for kind in (rows, own))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    for kind in (rows, own):
        kind.enter(NONE, [a, b], hold=False)
    same(2)
    same(2)
    assert frozen.recorded == 1
    for kind in (rows, own):
        kind.enter(torch.tensor([0, 1]), [c, d], hold=False)
    same(4)
    for kind in (rows, own):
        kind.keep(torch.tensor([1, 2]))
    assert rows.rows == 2
    same(2)
    same(2)
    assert frozen.recorded == 2


@torch.no_grad()
def test_weights_that_moved_are_recorded_again():
    policy, frozen = policy_of("qwen3", onednn=False), Frozen()
    rows, own = fixed(policy, recorder=frozen), Rows(policy, True)
    for kind in (rows, own):
        kind.enter(NONE, ragged(), hold=False)

    def same() -> None:
        found, wanted = (kind.step(torch.full((4,), 7)) for kind in (rows, own))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    for _ in range(3):
        same()
    assert (frozen.recorded, frozen.replayed) == (1, 2)
    for w in policy.model.parameters():  # in place: the graph reads them
        w.mul_(1.1)
    same()
    assert (frozen.recorded, frozen.replayed) == (1, 3)
    with swapped(policy, [1.1 * w for w in policy.parameters()]):
        same()
        assert frozen.replayed == 3
        same()
        assert (frozen.recorded, frozen.replayed) == (2, 4)
    same()
    same()
    assert (frozen.recorded, frozen.replayed) == (3, 5)


def test_nothing_is_kept_between_calls(monkeypatch):
    plain, made = Plain(), []
    start = GraphRows.__init__
    monkeypatch.setattr(graphs, "recorder", lambda policy: plain)
    monkeypatch.setattr(
        GraphRows, "__init__", lambda self, *args, **kwargs: made.append(weakref.ref(self)) or start(self, *args, **kwargs)
    )
    policy = policy_of("qwen3", graphs=True, ends=[1], max_new=10)
    paths(policy, ragged())
    before = plain.recorded
    gc.disable()  # a cycle of references would hold the buffers until the next collection
    try:
        paths(policy, ragged())
        assert len(made) == 3  # the comparison's and one for each call
        assert made[-1]() is None
    finally:
        gc.enable()
    assert plain.recorded == before + 1


def test_a_recording_that_fails_at_first_use_is_told_once_and_ordinary_rows_follow(monkeypatch):
    monkeypatch.setattr(graphs, "recorder", lambda policy: Broken())
    policy, own = both("qwen3")
    with pytest.warns(UserWarning, match="not permitted when stream is capturing.*own forward"):
        found = paths(policy, ragged())
    assert policy.graphs_agree is False
    assert_same(found, paths(own, ragged()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths(policy, ragged())


def test_a_recording_that_fails_later_does_not_lose_the_step(monkeypatch):
    policy, own = both("qwen3", ends=[1])
    paths(policy, ragged())
    assert policy.graphs_agree
    monkeypatch.setattr(graphs, "recorder", lambda policy: Broken())
    with pytest.warns(UserWarning, match="capturing") as told:
        found = paths(policy, ragged())
    assert len(told) == 1
    assert_same(found, paths(own, ragged()))
    assert policy.graphs_agree is False


# -- choice ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def kind_of(policy: TokenPolicy) -> type:
    return type(graphs.rows(policy, False, 100, 40))


def test_a_cpu_takes_them_only_when_told_to():
    model = tiny_model("qwen3")
    kinds = {on: kind_of(TokenPolicy(model, tiny_tokenizer(), graphs=on)) for on in (None, False, True)}
    assert [kind is GraphRows for kind in kinds.values()] == [False, False, True]


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_sliding_window_takes_the_ordinary_rows(family):
    policy, own = both(family)
    assert kind_of(policy) is Rows
    assert_same(paths(policy, ragged()), paths(own, ragged()))


def test_autocast_a_bending_rotary_basis_and_foreign_weights_take_the_ordinary_rows():
    def kind(model: Any, **numbers: Any) -> type:
        return kind_of(TokenPolicy(model, tiny_tokenizer(), graphs=True, lean=False, **numbers))

    assert kind(tiny_model("qwen3")) is GraphRows
    assert kind(tiny_model("qwen3"), autocast=torch.bfloat16) is Rows
    assert kind(tiny_model("qwen3", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})) is Rows
    assert kind(tiny_model("qwen3", attn_implementation="eager")) is GraphRows
    strange = tiny_model("qwen3")
    strange.model.norm.weight = type("Quantised", (torch.nn.Parameter,), {})(strange.model.norm.weight.detach())
    assert kind(strange) is Rows
    assert not graphs.supported(TokenPolicy(gemma3(), tiny_tokenizer()))


def test_rows_that_differ_are_not_taken(monkeypatch):
    step = GraphRows.step
    monkeypatch.setattr(GraphRows, "step", lambda self, token: step(self, token) * 1.01)
    policy = policy_of("qwen3", graphs=True, lean=False)
    with pytest.warns(UserWarning, match=r"differ by .* \(allowed 0.0001\)"):
        assert kind_of(policy) is Rows


def test_half_precision_is_judged_by_the_mean_of_a_distribution():
    policy = TokenPolicy(tiny_model("qwen3").to(torch.bfloat16), tiny_tokenizer(), graphs=True)
    assert kind_of(policy) is GraphRows


def test_weights_that_are_not_finite_leave_the_comparison_open():
    policy = policy_of("qwen3", graphs=True)
    first = next(iter(policy.parameters()))
    with torch.no_grad():
        first.fill_(float("nan"))
    with pytest.raises(GruppoError, match="not finite"):
        paths(policy, ragged())
    assert policy.graphs_agree is None


def test_the_configuration_reaches_the_policy():
    for asked in ({}, {"graphs": False}):
        config = RunConfig.model_validate({"world": "countdown", "policy": {**asked, "device": "cpu"}})
        policy: Any = build_policy(config, tiny_model("qwen3"), tiny_tokenizer())
        assert policy.graphs is asked.get("graphs")
