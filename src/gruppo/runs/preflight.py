"""Before step 0: one small group is sampled, read again and graded, so that what can be known to fail fails now."""

from __future__ import annotations

from typing import Any

import torch

from gruppo.policies.flow import Course, FlowPolicy
from gruppo.recipe import check_needs
from gruppo.runs.config import RunConfig
from gruppo.runs.stages import Stage
from gruppo.types import Group, GruppoError, Path, Task

MOST_GAP = 0.01  # nats between sampler and trainer in float32; 1e-6 is usual, a wrong position or temperature gives 0.1 and more


def preflight(policy: Any, config: RunConfig, stage: Stage, training: list[Task] | None, stored: list[Group]) -> None:
    """What the recipe needs is there, sampler and trainer agree, and the graders grade."""
    task = stage.at(0)
    check_needs(stage.recipe, training or [task])
    rng = torch.Generator().manual_seed(stage.config.fit.seed)
    if stored:  # as it was read: the prompt's text is not tokenised again
        first = stored[0].paths[0]
        paths = policy.sample([first.prompt] * 2, g=rng, max_new=min(32, policy.max_new, len(first)))
    else:
        paths = probe(policy, task, rng)
    agree(policy, config, paths)
    if not stored:
        graded = stage.grade.preflight([Group(task, paths)])[:1]
    else:
        graded = stage.grade.preflight(stored[:1]) if stage.config.rewards else stored
    check_needs(stage.recipe, (), graded)


def probe(policy: Any, task: Task, g: torch.Generator) -> list[Path]:
    """Two short paths, as training would sample them, to be graded and read again before step 0."""
    if not isinstance(policy, FlowPolicy):
        return policy.sample([task.prompt] * 2, g=g, max_new=min(32, policy.max_new))
    sigmas = policy.sigmas
    course = Course.of(task.prompt, sigmas, policy.kernel)
    done = policy.walk(policy.noise(2, g), [course], 0, len(course), g=g, counted="probed")
    logp = done.logp.cpu()
    images = policy.decode(done.last)
    return [Path(course, done.x[i], logp[i], course.stochastic, images[i]) for i in range(2)]


def agree(policy: Any, config: RunConfig, paths: list[Path]) -> None:
    """Sampler and trainer must say the same about the same steps; in float32 there is no excuse."""
    if config.policy.dtype != "float32" or config.policy.autocast:
        return
    most = getattr(policy, "most_gap", MOST_GAP)  # more where the sampler is another program
    read = policy.score(paths)
    gap = max((float((p.logp - now)[p.mask].abs().max()) for p, now in zip(paths, read) if p.mask.any()), default=0.0)
    if not gap < most:
        raise GruppoError(
            f"the sampler's and the trainer's log-probabilities of the same steps differ by {gap:.3g} before step 0 (in "
            f"float32 at most {most}), so every ratio would be wrong; `gruppo doctor --model ...` looks closer"
        )
