"""The laws: each takes a recipe (and, to plant faults, a way to make a policy) and asserts one statement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.gaussian import WithGaussianKL, gaussian_kl
from gruppo.core.kl import WithKL
from gruppo.core.reduce import weigh
from gruppo.core.tree import edges, owners
from gruppo.policies.flow import Course, FlowPolicy
from gruppo.policies.kernels import FlowSDE
from gruppo.policies.reference import Frozen
from gruppo.policies.token import TokenPolicy
from gruppo.recipe import Recipe
from gruppo.recipes.golden import Draw, Trial, grading, tiny_policy
from gruppo.recipes.golden_flow import QUADRANTS, FlowDraw, flow_grading, tiny_flow
from gruppo.train import accumulate
from gruppo.types import Batch, Group, Path, Reference

Make = Callable[..., TokenPolicy | FlowPolicy]
COLD = 0.7  # a temperature other than 1, or half of the faults would not show


# ---- the scene that most laws share


def sampled(recipe: Recipe, policy: TokenPolicy, seed: int = 0, prompts: int = 4) -> list[Group]:
    """Fresh groups of unequal sizes from the recipe's own rollout, with rewards that differ inside each group."""
    if recipe.reference is not None:
        policy.reference = recipe.reference(policy)
    rng = torch.Generator().manual_seed(seed)
    groups = rolled(recipe, policy, prompts, rng)
    groups[0] = first_rows(groups[0], len(groups[0]) - 3)
    return [rewarded(g, torch.rand(len(g), generator=rng).round(decimals=1) + torch.arange(len(g)) % 2) for g in groups]


def rolled(recipe: Recipe, policy: TokenPolicy | FlowPolicy, prompts: int, rng: torch.Generator) -> list[Group]:
    """The recipe's own rollout on the tiny task of the policy's family."""
    if isinstance(policy, FlowPolicy):
        return recipe.rollout(policy, FlowDraw(0, 0, [0]).more(prompts), flow_grading(), rng)
    return recipe.rollout(policy, Draw(0, 0, [0]).more(prompts), grading(), rng)


def rewarded(group: Group, reward: Tensor) -> Group:
    """The group with another raw reward, written as the graders would write it."""
    return group.with_(signals={**group.signals, "reward": reward.float()})


def first_rows(group: Group, n: int) -> Group:
    """The group's first n paths with their signals."""
    return picked(group, list(range(n)))


def picked(group: Group, rows: list[int]) -> Group:
    """These paths in this order, their signals with them and their forks pointing at the new rows.

    Where a parent is left out, its first child that stays takes its place: the steps before the fork are the child's own then.
    """
    signals = {k: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for k, v in group.signals.items()}
    paths = list(group.paths)
    for gone in (i for i in range(len(paths)) if i not in rows):
        heir = None
        for i in (i for i in rows if i > gone and (paths[i].fork or (-1, 0))[0] == gone):
            t = paths[i].fork[1]
            if heir is None:
                heir, before = i, torch.arange(len(paths[i])) < t
                up = paths[gone].fork
                fork = None if up is None else (up[0], min(up[1], t))
                paths[i] = replace(paths[i], fork=fork, mask=paths[i].mask | (paths[gone].mask & before))
            else:
                paths[i] = replace(paths[i], fork=(heir, t))

    def moved(path: Path) -> Path:
        return path if path.fork is None else replace(path, fork=(rows.index(path.fork[0]), path.fork[1]))

    return Group(group.task, [moved(paths[i]) for i in rows], signals)


def compared(recipe: Recipe, groups: list[Group]) -> list[Group]:
    """Reward, abstention, advantage and batch-level step, as an iteration does them."""
    groups = [drop_abstained(g.with_(reward=recipe.reward(g))) for g in groups]
    return recipe.across([g.with_(advantage=recipe.advantage(g)) for g in groups])


def weighed(recipe: Recipe, groups: list[Group]) -> Batch:
    """One batch of everything, with its weights."""
    return weigh(collate(compared(recipe, groups)), recipe.reduce)


def shaken(policy: TokenPolicy, by: float = 0.05) -> TokenPolicy:
    """The same policy after a random step, so that ratios are not 1."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return policy


def gradient(policy: TokenPolicy, batch: Batch, recipe: Recipe, ref: Reference | None, budget: int = 10**9) -> Tensor:
    """The gradient of the batch's objective, as one vector."""
    for p in policy.parameters():
        p.grad = None
    accumulate(policy, batch, recipe, ref=ref, budget=budget)
    return flat_gradient(policy)


def flat_gradient(policy: TokenPolicy) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.parameters()])


def off_policy_scene(recipe: Recipe, make: Make) -> tuple[TokenPolicy, Batch, Reference | None]:
    """A batch, and the policy one random step later."""
    policy = make(temperature=COLD)
    batch = weighed(recipe, sampled(recipe, policy))
    return shaken(policy), batch, policy.reference


def close(a: Tensor, b: Tensor, rel: float = 1e-5) -> None:
    """Equal up to rel of the larger vector's size."""
    gap, size = float((a - b).norm()), float(torch.maximum(a.norm(), b.norm()))
    assert gap <= rel * size + 1e-8, f"they differ by {gap:.3g}, their size is {size:.3g}"


# ---- the laws


def agree(recipe: Recipe, make: Make = tiny_policy) -> None:
    """On fresh paths the policy says what the sampler said, at a temperature other than 1, and every ratio is 1."""
    policy = make(temperature=COLD)
    batch = weighed(recipe, sampled(recipe, policy))
    with torch.no_grad():
        now = policy.evaluate(batch)
    for said in (batch.logp_sampler, batch.logp_old):
        assert float(((now.logp - said) * batch.mask).abs().max()) < 1e-4
    _, stats = recipe.loss(batch, now, None if recipe.reference is None else Frozen(policy).evaluate(batch))
    if "ratio" in stats:
        assert float((stats["ratio"][batch.mask] - 1).abs().max()) < 1e-3


def end(recipe: Recipe, make: Make = tiny_policy) -> None:
    """A path that ended by itself trains its end token: stopping is a decision too."""
    policy = make(temperature=COLD)
    if isinstance(policy, FlowPolicy):
        return  # every denoising path has the grid's length
    ended = [p for g in sampled(recipe, policy) for p in g.paths if not p.truncated]
    assert ended, "no path of this scene ended, so it shows nothing"
    for path in ended:
        assert int(path.steps[-1]) in policy.eos
        assert bool(path.mask[-1]) or not path.mask.any()


def own(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Every path answers its own group's task, and the batch knows which group each row is from."""
    policy = make(temperature=COLD)
    groups = sampled(recipe, policy)
    for group in groups:
        for path in group.paths:
            if isinstance(policy, FlowPolicy):
                assert path.prompt.prompt == group.task.prompt
            else:
                assert torch.equal(path.prompt, policy.encode(group.task.prompt))
    batch = collate(compared(recipe, groups))
    rows = iter(zip(batch.paths, batch.group.tolist()))
    for n, group in enumerate(groups):
        for path in group.paths:
            row, at = next(rows)
            assert at == n
            assert torch.equal(row.steps, path.steps)


def micro(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Any block size gives the same gradient, away from the weights that sampled as well."""
    policy, batch, ref = off_policy_scene(recipe, make)
    once = gradient(policy, batch, recipe, ref)
    assert float(once.norm()) > 1e-4
    for budget in (3, 17) if isinstance(policy, FlowPolicy) else (30, 100):  # calls of the network, or tokens
        close(gradient(policy, batch, recipe, ref, budget), once)


def weight(recipe: Recipe, make: Make = tiny_policy, *, one: bool = True) -> None:
    """In each optimizer step the weights are not negative, 0 off the mask, and sum to 1; no row is left out."""
    policy = make(temperature=COLD)
    whole = collate(compared(recipe, sampled(recipe, policy)))
    trained: list[Path] = []
    for part in recipe.cadence(whole):
        part = weigh(part, recipe.reduce)
        assert float(part.weight.min()) >= 0
        assert not part.weight[~part.mask].any()
        total = float(part.weight.sum())
        assert abs(total - 1) < 1e-5 if one else total > 0
        trained += part.paths
    counts = [sum(t is p for t in trained) for p in whole.paths if p.mask.any()]
    assert min(counts) == max(counts) >= 1


def flat(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Equal rewards give no gradient at all while the policy stands where its reference stands."""
    policy = make(temperature=COLD)
    groups = [drop_abstained(g.with_(reward=torch.full((len(g),), 0.3))) for g in sampled(recipe, policy)]
    groups = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in groups])
    batch = weigh(collate(groups), recipe.reduce)
    ref = Frozen(policy) if recipe.reference else None
    assert float(gradient(policy, batch, recipe, ref).abs().max()) < 1e-6


def masked(recipe: Recipe, make: Make = tiny_policy) -> None:
    """What stands at a masked step, advantage or log-probability, changes nothing."""
    policy, batch, ref = off_policy_scene(recipe, make)
    mask = batch.mask.clone()
    mask[:, 1::3] = False
    paths = [replace(p, mask=mask[i, : len(p)]) for i, p in enumerate(batch.paths)]
    batch = weigh(batch.with_(mask=mask, paths=paths), recipe.reduce)
    before = gradient(policy, batch, recipe, ref)
    off = ~mask
    junk = batch.with_(
        advantage=batch.advantage + 3.0 * off, logp_old=batch.logp_old - 2.0 * off, logp_sampler=batch.logp_sampler + 1.5 * off
    )
    assert float(before.norm()) > 1e-4
    close(gradient(policy, junk, recipe, ref), before, rel=1e-7)


def order(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Permuted paths have permuted advantages."""
    policy = make(temperature=COLD)
    groups = sampled(recipe, policy)
    straight = compared(recipe, groups)
    g = torch.Generator().manual_seed(3)
    turns = [shuffled(group, g) for group in groups]
    turned = compared(recipe, [picked(group, rows) for group, rows in zip(groups, turns)])
    for rows, a, b in zip(turns, straight, turned):
        assert a.advantage is not None
        assert b.advantage is not None
        assert torch.allclose(b.advantage, a.advantage[rows], atol=1e-5)


def shuffled(group: Group, g: torch.Generator) -> list[int]:
    """A random order of the rows in which parents stand before their children."""
    rank, out = torch.rand(len(group), generator=g), []
    while len(out) < len(group):
        ready = [i for i, p in enumerate(group.paths) if i not in out and (p.fork is None or p.fork[0] in out)]
        out.append(min(ready, key=lambda i: float(rank[i])))
    return out


def pad(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Longer padding changes nothing: neither a wider batch nor a longer neighbour."""
    policy, batch, ref = off_policy_scene(recipe, make)

    def objective(b: Batch) -> Tensor:
        for p in policy.parameters():
            p.grad = None
        with torch.no_grad():
            fixed = None if ref is None else ref.evaluate(b)
        loss, _ = recipe.loss(b, policy.evaluate(b), fixed)
        (b.weight * loss).sum().backward()
        return flat_gradient(policy)

    wide = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, 5), value=fill)
        for name, fill in {"logp_old": 0.0, "logp_sampler": 0.0, "advantage": 0.0, "mask": False, "unit": -1}.items()
    }
    close(objective(weigh(batch.with_(**wide, weight=torch.zeros(wide["mask"].shape)), recipe.reduce)), objective(batch))
    together = policy.evaluate(batch).logp
    for i in range(0, len(batch), 5):
        alone = policy.evaluate(batch.rows([i])).logp[0]
        assert torch.allclose(alone, together[i, : len(alone)], atol=1e-4)


def singleton(recipe: Recipe, make: Make = tiny_policy) -> None:
    """A group of one has nothing to be compared with: its advantage is 0, in a batch of its own or beside others."""
    policy = make(temperature=COLD)
    groups = sampled(recipe, policy)
    lone = first_rows(groups[0], 1)
    for beside in ([], groups[1:]):
        first = compared(recipe, [lone, *beside])[0]
        assert first.advantage is not None
        assert torch.equal(first.advantage, torch.zeros(1, len(lone.paths[0])))


def abstain(recipe: Recipe, make: Make = tiny_policy) -> None:
    """A path whose reward is NaN might as well not have been sampled."""
    policy = make(temperature=COLD)
    groups = sampled(recipe, policy)
    group = groups[1]
    reward = group.signals["reward"].clone()
    reward[2] = torch.nan
    without = picked(group, [i for i in range(len(group)) if i != 2])
    absent = weighed(recipe, [groups[0], without, *groups[2:]])
    silent = weighed(recipe, [groups[0], rewarded(group, reward), *groups[2:]])
    row = len(groups[0]) + 2
    assert not silent.weight[row].any()
    policy = shaken(policy)
    a, b = gradient(policy, silent, recipe, policy.reference), gradient(policy, absent, recipe, policy.reference)
    assert float(a.norm()) > 1e-4
    close(a, b)


def once(recipe: Recipe, make: Make = tiny_policy) -> None:
    """A decision that several paths share is trained by one of them."""
    for group in sampled(recipe, make(temperature=COLD)):
        assert int(owners(edges(group), group.mask).sum()) == int(group.mask.sum())


def pull(recipe: Recipe, make: Make = tiny_policy) -> None:
    """A reference pulls back: in the loss a small step lowers the divergence, in the reward the path that left it earns less."""
    if recipe.reference is None:
        return
    policy = make(temperature=COLD)
    policy.reference = reference = recipe.reference(policy)
    groups = rolled(recipe, shaken(policy), 4, torch.Generator().manual_seed(0))
    groups = [rewarded(g, torch.ones(len(g))) for g in groups]
    moved = [recipe.reward(g) for g in groups]
    if any("logp_ref" in g.signals for g in groups):  # the KL is in the reward
        for group, reward in zip(groups, moved):
            far = torch.stack([((p.logp - r) * p.mask).sum() for p, r in zip(group.paths, group.signals["logp_ref"])])
            assert float(((reward - reward.mean()) * (far - far.mean())).sum()) < 0
        return
    assert isinstance(recipe.loss, (WithKL, WithGaussianKL))
    batch = weighed(recipe, groups)
    batch = batch.with_(advantage=torch.zeros_like(batch.advantage))  # a shaped reward may vary where the raw one does not

    def divergence() -> float:
        with torch.no_grad():
            now, fixed = policy.evaluate(batch), reference.evaluate(batch)
        if isinstance(recipe.loss, WithGaussianKL):
            return float((batch.weight * gaussian_kl(now, fixed)).sum())
        d = now.logp - fixed.logp
        return float((batch.weight * ((-d).exp() + d - 1)).sum())

    before, slope = divergence(), gradient(policy, batch, recipe, reference)
    assert float(slope.norm()) > 1e-6
    at = 0
    with torch.no_grad():
        for p in policy.parameters():
            p.sub_(1e-3 * slope[at : at + p.numel()].view_as(p) / slope.norm())
            at += p.numel()
    assert divergence() < before


def resume(recipe: Recipe, make: Make = tiny_policy) -> None:
    """Saved after two iterations and loaded into a new run, the third one is the same bit for bit."""
    family = "image" if make is tiny_flow else "text"
    trial = Trial.of(recipe, family=family)
    trial.advance()
    trial.advance()
    saved = {
        "model": {k: v.clone() for k, v in trial.policy.model.state_dict().items()},
        "optimizer": trial.optimizer.state_dict(),
        "rng": trial.rng.get_state(),
        "reference": None if trial.reference is None else trial.reference.state_dict(),
        "memory": [m.state_dict() for m in recipe.state],
        "stream": list(trial.stream),
    }
    expected = trial.advance()
    other = Trial.of(recipe, family=family)
    other.policy.model.load_state_dict(saved["model"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other.rng.set_state(saved["rng"])
    other.stream[:] = saved["stream"]
    if other.reference is not None:
        other.reference.load_state_dict(saved["reference"])
    for memory, state in zip(recipe.state, saved["memory"]):
        memory.load_state_dict(state)
    found = other.advance()
    assert found.stats == expected.stats
    for a, b in zip(trial.policy.parameters(), other.policy.parameters()):
        assert torch.equal(a, b)


MAKE: dict[str, Make] = {"text": tiny_policy, "image": tiny_flow}  # the policy of a family's laws

# Advantages of a right and a wrong path of r = [1,0,0,1,1,0,0,0] (mean .375, sample std .517549).
EXPECTED: dict[str, tuple[float, float]] = {
    "grpo": (1.207381, -0.724429),
    "grpo-tis": (1.207381, -0.724429),
    "grpo-mis": (1.207381, -0.724429),
    "dr-grpo": (0.625, -0.375),
    "dapo": (1.207612, -0.724567),
    "gspo": (1.207381, -0.724429),
    "gspo-token": (1.207381, -0.724429),
    "cispo": (1.207612, -0.724567),
    "scalerl": (1.207381, -0.724429),  # one group: the batch's std is the group's
    "rloo": (0.714286, -0.428571),
    "unlikeliness": (1.207612, -0.724567),  # equally likely paths share one rank: the discount is a factor, which std takes back
    "xrpo": (1.207612, -0.724567),  # equally likely paths: nothing is rare
    "rank-grpo": (1.207381, -0.724429),  # each rank earns what its path earns
    "seed-grpo": (0.599981, -0.359989),  # no path here has an answer: the largest entropy, .625 / 1.0417
    "stratified-grpo": (1.290992, -0.774595),  # the population std; all paths here are of one stratum
    "rec-reinforce": (0.625, -0.375),
    "rec-oneside": (0.625, -0.375),
    "rec-oneside-is": (0.625, -0.375),
    "rec-twoside": (0.625, -0.375),
    "rec-twoside-is": (0.625, -0.375),
    "rec-ring": (0.625, -0.375),
    "rec-ring-is": (0.625, -0.375),
    "opmd": (0.625, -0.375),
    "kimi-opmd": (0.625, -0.375),
    "asymre": (0.725, -0.275),
    "red-drop": (0.5, -0.5),  # of the five wrong paths the two with the lowest lots are dropped: DROPPED
    "red-weight": (1.167654, -0.257733),  # .625 e^.625, -.375 e^-.375
    "multi-objective-grpo": (1.207612, -0.724567),
    "flow-grpo-fast": (1.290728, -0.774437),
    "flow-cps": (1.290728, -0.774437),
    "grpo-guard": (1.290728, -0.774437),
    "dance-grpo": (1.207615, -0.724569),
    "mix-grpo": (1.207615, -0.724569),
    "mix-grpo-flash": (1.207615, -0.724569),
    "flow-grpo": (1.290728, -0.774437),  # the population std, .484123 + 1e-4
    "tempflow-grpo": (1.290728, -0.774437),
    "g2rpo": (1.207615, -0.724569),  # one view, the sample std
    "branch-grpo": (1.207615, -0.724569),  # paths that share nothing: each is a node of its own at every depth
    "branch-grpo-mix": (1.207615, -0.724569),
    "gdpo": (1.207494, -0.724496),  # normalised twice: over the group, then over a batch that is this group
    "pref-grpo": (1.207615, -0.724569),  # win rates .857 and .286: two values standardise alike, whatever they are
}

# Where a group's lots are 0, 1/8, 2/8, ..., these rows are dropped and have the advantage 0.
DROPPED: dict[str, list[int]] = {"red-drop": [1, 2]}
FLAT: dict[str, float] = {"asymre": 0.1}  # advantages of equal rewards, where they are not 0


def paper(recipe: Recipe, make: Make = tiny_policy, *, name: str) -> None:
    """The worked numbers: advantages of r = [1,0,0,1,1,0,0,0], spread over every step, and those of r = [1,1,1,1]."""
    reward = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    right, wrong = EXPECTED[name]
    path = Path(torch.tensor([2]), torch.tensor([4, 5, 1]), torch.zeros(3), torch.ones(3, dtype=torch.bool), "ab")
    if make is tiny_flow:
        grid = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
        path = replace(path, prompt=Course.of("a", grid, FlowSDE()), steps=torch.zeros(4, 2), output=QUADRANTS["a"])
    zero = [torch.zeros(3)] * 8
    more = {"logp_ref": zero, "lot": torch.arange(8) / 8}
    group = Group(Draw(0, 1).__iter__().__next__(), [path] * 8, {"reward": reward, "correct": reward, **more})
    found = compared(recipe, [group])[0].advantage
    assert found is not None
    expected = torch.where(reward > 0, right, wrong)[:, None].repeat(1, 3)
    expected[DROPPED.get(name, [])] = 0.0
    assert torch.allclose(found, expected, atol=1e-6)
    more = {k: v[:4] for k, v in more.items()}
    same = Group(group.task, [path] * 4, {"reward": torch.ones(4), "correct": torch.ones(4), **more})
    none = compared(recipe, [same])[0].advantage
    assert none is not None
    assert torch.equal(none, torch.full((4, 3), FLAT.get(name, 0.0)))


LAWS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (agree, end, own, micro, weight, flat, masked, order, pad, singleton, abstain, once, pull, resume, paper)
}
