"""Groups into a batch, and the places where an optimizer step may fall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from gruppo.types import Batch, Group, GruppoError, pad, units


def collate(groups: list[Group]) -> Batch:
    """All paths of all groups as rows [B, T], in order; refuses a trained step without a finite number."""
    paths = [p for g in groups for p in g.paths]
    if not paths:
        raise GruppoError("there is nothing to train on: the rollout and `across` left no path in this iteration")
    width = max(len(p) for p in paths)
    mask = pad([p.mask for p in paths], width, False)
    advantage = []
    for n, g in enumerate(groups):
        if g.advantage is None or g.advantage.shape != (len(g), g.width):
            got = None if g.advantage is None else tuple(g.advantage.shape)
            raise GruppoError(f"group {n} has {len(g)} paths of up to {g.width} steps, but its advantage has shape {got}")
        advantage += list(g.advantage)
    adv = pad(advantage, width, 0.0).to(mask.device)
    old = pad([p.logp if p.logp_train is None else p.logp_train for p in paths], width, 0.0)
    sampler = pad([p.logp for p in paths], width, 0.0)
    for name, value in {"advantage": adv, "behaviour log-prob": old, "sampler log-prob": sampler}.items():
        bad = mask & ~value.isfinite()
        if bad.any():
            row, t = bad.nonzero()[0].tolist()
            raise NotFinite(
                f"the {name} is {float(value[row, t])} at step {t} of path {row} ({int(bad.sum())} of {int(mask.sum())} "
                "trained steps are not finite)",
                groups,
            )
    off = ~mask
    return Batch(
        paths=paths,
        logp_old=old.float().masked_fill(off, 0.0),
        logp_sampler=sampler.float().masked_fill(off, 0.0),
        advantage=adv.float().masked_fill(off, 0.0),
        mask=mask,
        weight=torch.zeros(mask.shape, device=mask.device),
        unit=pad([units(p) for p in paths], width, -1),
        group=torch.tensor([n for n, g in enumerate(groups) for _ in g.paths]),
        off_policy=torch.tensor([p.off_policy for p in paths]),
    )


class NotFinite(GruppoError):
    """A number that training needs is NaN or infinite; carries the groups so that the run can save them."""

    def __init__(self, sentence: str, groups: list[Group]) -> None:
        super().__init__(sentence)
        self.groups = groups


def drop_abstained(group: Group) -> Group:
    """A path without a reward trains nothing and counts nowhere; its steps stay as context for its forks."""
    if group.reward is None:
        return group
    gone = group.reward.isnan()
    gone = gone if gone.dim() == 1 else gone.all(1)
    if not gone.any():
        return group
    paths = [replace(p, mask=torch.zeros_like(p.mask)) if g else p for p, g in zip(group.paths, gone.tolist())]
    return group.with_(paths=paths)


@dataclass(frozen=True)
class Passes:
    """`epochs` passes over the batch, each cut into `parts` optimizer steps of whole groups, in order."""

    epochs: int = 1
    parts: int = 1

    def __call__(self, batch: Batch) -> Iterable[Batch]:
        ids = batch.group.unique()
        if self.parts > len(ids):
            raise GruppoError(f"{self.parts} optimizer steps per pass need at least as many groups, this batch has {len(ids)}")
        for _ in range(self.epochs):
            for some in torch.tensor_split(ids, self.parts):
                rows = torch.isin(batch.group, some).nonzero()[:, 0]
                yield batch.rows(rows.tolist())


def blocks(costs: list[int], size: int) -> Iterator[list[int]]:
    """Indices in runs whose widest cost times their number stays within `size`; longest first, at least one a run."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    run: list[int] = []
    for i in order:
        if run and costs[run[0]] * (len(run) + 1) > size:
            yield run
            run = []
        run.append(i)
    if run:
        yield run
