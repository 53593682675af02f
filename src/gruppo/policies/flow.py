"""The policy of flow and diffusion models: noise, walk, evaluate, split.

A path is a row of denoising transitions: `Path.steps` are the latents x_0 (noise) .. x_T (picture), step t leads from x_t to
x_{t+1}. `Path.prompt` is a `Course`: the prompt together with the grid and the noise of every step, because a transition's
log-probability means nothing without them.

A `Painter` is all that differs between networks: what a prompt is, what a latent is, one network call, one decoding.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.policies import products
from gruppo.policies.kernels import DDIM, FlowSDE, History, Kernel, Solver, over
from gruppo.types import Batch, GruppoError, Path, Reference, Scope, Steps

KEPT = 4 * 2**30  # bytes of conditions that are remembered: an endless stream of prompts must not fill the memory


@runtime_checkable
class Painter(Protocol):
    """A denoising network and what surrounds it; a new pipeline is one class with these members.

    A painter whose network predicts epsilon says so with a further member, `epsilon = True`.
    """

    model: torch.nn.Module  # the network that is trained; everything else is frozen
    shape: tuple[int, ...]  # of one latent
    tokens: int  # what one network call on one latent costs, as the length of the network's sequence

    def encode(self, prompts: list[Any]) -> list[Any]:
        """The conditioning of each prompt, without gradient. Asked once per prompt and kept."""
        ...

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        """The network's prediction (velocity; epsilon for DDIM) for latents [P, ...] at noise levels [P], with gradient."""
        ...

    def decode(self, x: Tensor) -> list[Any]:
        """Finished latents as PIL images; a video is a list of them."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The grid [steps + 1] from noise to picture, in float64."""
        ...

    def save(self, folder: FilePath) -> None:
        """A folder from which the pipeline's own library loads everything again."""
        ...

    def restore(self, folder: FilePath) -> None:
        """The trained weights of a folder that `save` wrote, into the network as it was built."""
        ...


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance as a part of the policy: v = v_u + scale (v_c - v_u).

    `detach` sends no gradient through the unconditional branch. `rescale` gives the guided prediction the norm of the
    conditional one along the last axis (Qwen-Image).
    """

    scale: float
    detach: bool = False
    rescale: bool = False
    negative: str = ""

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        u = unconditional.detach() if self.detach else unconditional
        out = u + self.scale * (conditional - u)
        if self.rescale:
            size = conditional.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True).clamp(min=1e-8)
            out = out * size
        return out


@dataclass(frozen=True, eq=False)
class Course:
    """Under what a path's transitions were drawn: the prompt, the grid [T + 1], the kernel, and each step's noise level [T]."""

    prompt: Any
    kernel: Kernel
    sigmas: Tensor
    levels: Tensor  # 0 = the step is deterministic

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def deviations(self) -> Tensor:
        """[T] standard deviation of every step; 0 where it is deterministic."""
        return self.kernel.deviation(self.sigmas[:-1], self.sigmas[1:], self.levels)

    @property
    def stochastic(self) -> Tensor:
        """[T] bool: steps that draw something. A step to sigma 0 may have a level and yet draw nothing (CPS)."""
        return self.deviations > 0

    @staticmethod
    def of(prompt: Any, sigmas: Tensor, kernel: Kernel, noisy: Iterable[int] | None = None) -> Course:
        """Noise at the steps `noisy` (every step when None), none elsewhere."""
        T = len(sigmas) - 1
        levels = kernel.levels(sigmas)
        if noisy is not None:
            keep = torch.zeros(T, dtype=torch.bool)
            for t in noisy:
                if not 0 <= t < T:
                    raise GruppoError(f"step {t} is to be noisy, but the grid has only the steps 0 to {T - 1}")
                keep[t] = True
            levels = torch.where(keep, levels, torch.zeros_like(levels))
        return Course(prompt, kernel, sigmas, levels)


@dataclass
class Walk:
    """Latents on the way: `x` [n, k + 1, ...] at the steps begin .. begin + k, `logp` and `mean` of those steps.

    `x` and `mean` are in the host's memory: at 1024 x 1024 pixels a latent is a megabyte, and a batch holds thousands.
    """

    x: Tensor  # the last latent alone [n, 1, ...] where the trail was not asked for
    last: Tensor  # [n, ...] where the network stands
    logp: Tensor  # [n, k], 0 at deterministic steps
    mean: Tensor | None  # [n, k, ...] where asked for
    clean: Tensor  # [n, ...] the picture that the last network call expected
    history: History = field(default_factory=list)  # what a solver may look back at


class FlowPolicy:
    """A painter as a policy. `counts` says what was computed: calls of the network, by purpose, and trained steps."""

    def __init__(
        self,
        painter: Painter,
        *,
        steps: int,
        eval_steps: int | None = None,
        cfg: CFG | None = None,
        rows: int = 64,
        autocast: torch.dtype | None = None,
        onednn: bool | None = None,  # large float32 products by oneDNN; None: where it is known to be the faster one
    ) -> None:
        if steps < 1:
            raise GruppoError(f"the policy is to paint in {steps} steps; it needs at least 1")
        self.painter, self.cfg, self.rows, self.autocast = painter, cfg, rows, autocast
        self.steps, self.eval_steps = steps, eval_steps or steps
        self.reference: Reference | None = None
        self.counts: Counter[str] = Counter()
        self._conditions: dict[Hashable, Any] = {}
        self._bytes = 0  # of the conditions
        again = any(getattr(m, "gradient_checkpointing", False) for m in painter.model.modules())  # in backward, outside `with`
        quick = products.chosen(onednn) and self.device.type == "cpu" and not again
        self.linears = products.Linears(painter.model) if quick else None
        painter.model.eval()  # dropout would make the ratio differ from 1 before the first update

    @property
    def model(self) -> Any:
        return self.painter.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder: FilePath, *, merge: bool = False) -> None:
        """A folder that the pipeline's own library loads."""
        if merge:
            raise GruppoError("policy.lora.merge is for text models; a painter's adapter is saved in its pipeline's own form")
        self.painter.save(folder)

    def restore(self, folder: FilePath) -> None:
        """The weights of a folder that `save` wrote."""
        self.painter.restore(folder)

    # -- painting -----------------------------------------------------------------------------------------------------

    @property
    def sigmas(self) -> Tensor:
        """The grid of training, [steps + 1]."""
        return self.painter.sigmas(self.steps)

    @property
    def epsilon(self) -> bool:
        """Whether the network predicts epsilon; velocity otherwise."""
        return getattr(self.painter, "epsilon", False)

    @property
    def kernel(self) -> Kernel:
        """A kernel that reads what the network predicts; without noise all of its kind take the same step."""
        return DDIM() if self.epsilon else FlowSDE()

    def fitting(self, kernel: Kernel) -> Kernel:
        """The kernel, if it reads what the network predicts."""
        if isinstance(kernel, DDIM) != self.epsilon:
            told = "epsilon, which only the kernel DDIM reads" if self.epsilon else "velocity, and DDIM reads epsilon"
            raise GruppoError(f"the kernel is {type(kernel).__name__}, but this network predicts {told}")
        return kernel

    def noise(self, n: int, g: torch.Generator) -> Tensor:
        """[n, ...] latents of pure noise; drawn on the CPU, so that a seed means the same everywhere."""
        return torch.randn(n, *self.painter.shape, generator=g).to(self.device)

    @torch.no_grad()
    def walk(
        self,
        x: Tensor,
        courses: Sequence[Course],
        begin: int,
        end: int,
        *,
        g: torch.Generator | None = None,
        noise: Tensor | None = None,
        solver: Solver | None = None,
        history: History | None = None,
        trail: bool = True,
        means: bool = False,
        counted: str = "sampled",
    ) -> Walk:
        """Rows `x` [n, ...] from step `begin` to step `end` of their courses (one per row, or one for all; one length).

        Noisy steps draw with `g`, or take `noise` [n, end - begin, ...]. Deterministic steps are the kernel's own, or the
        solver's, which may look back at `history` (as the walk before left it). `trail` keeps the latents of every step,
        `means` those that noisy steps were drawn around.
        """
        courses = list(courses) * (len(x) if len(courses) == 1 else 1)
        if len(courses) != len(x):
            raise GruppoError(f"{len(x)} latents walk along {len(courses)} courses; give one course, or one per latent")
        sigma = torch.stack([c.sigmas for c in courses]).to(self.device)
        level = torch.stack([c.levels for c in courses]).to(self.device)
        same = all(c.kernel == courses[0].kernel for c in courses)
        if not same:
            raise GruppoError("latents that walk together must have one kernel")
        kernel = self.fitting(courses[0].kernel)
        if solver is not None and self.epsilon:
            raise GruppoError(f"{type(solver).__name__} solves rectified flows, but this network predicts epsilon")
        if solver is not None and not (bool((sigma == sigma[:1]).all()) and bool(((level > 0) == (level[:1] > 0)).all())):
            raise GruppoError(
                f"{type(solver).__name__} takes one step for all latents that walk together, but these {len(x)} have different "
                "grids or different noisy steps; walk them apart"
            )
        x = x.to(self.device)
        latents, logps, centres = [x.cpu()], [], []
        past: History = list(history or [])
        clean = x
        for t in range(begin, end):
            a, b, s = sigma[:, t].float(), sigma[:, t + 1].float(), level[:, t].float()
            v = self.velocity(x, a, [c.prompt for c in courses], counted=counted)
            clean = kernel.clean(x, v, a)
            std = kernel.deviation(a, b, s)
            mean = kernel.mean(x, v, a, b, s)
            if solver is not None:
                past = [*past[-1:], (float(a[0]), clean)]
            if bool((std > 0).any()):
                if noise is not None:
                    eps = noise[:, t - begin].to(x)
                elif g is not None:
                    eps = torch.randn(x.shape, generator=g).to(x)
                else:
                    raise GruppoError(f"step {t} draws noise, but the walk got no generator")
                x = mean + over(std, x) * eps
                safe = torch.where(std > 0, std, torch.ones_like(std))
                logp = torch.where(std > 0, kernel.logp(x, mean, safe), torch.zeros_like(std))
            else:
                x = mean if solver is None else solver(x, past, float(b[0]))
                mean = x
                logp = torch.zeros_like(std)
            logps.append(logp)
            if trail:
                latents.append(x.cpu())
            if means:
                centres.append(mean.cpu())
        empty = x.new_zeros(len(x), 0)
        return Walk(
            torch.stack(latents, 1) if trail else x.cpu()[:, None],
            x,
            torch.stack(logps, 1) if logps else empty,
            None if not means else torch.stack(centres, 1) if centres else x.cpu().new_zeros(len(x), 0, *x.shape[1:]),
            clean,
            past,
        )

    @torch.no_grad()
    def decode(self, x: Tensor) -> list[Any]:
        """Pictures of finished latents."""
        self.counts["decoded"] += len(x)
        return [image for part in x.split(self.rows) for image in self.painter.decode(part)]

    @torch.no_grad()
    def sample(self, prompts: Sequence[Any], *, g: torch.Generator) -> list[Path]:
        """One picture per prompt, painted without noise on the evaluation's grid.

        Nothing in these paths can be trained, so of their latents only the last is kept.
        """
        sigmas = self.painter.sigmas(self.eval_steps)
        courses = [Course.of(p, sigmas, self.kernel, ()) for p in prompts]
        done = self.walk(self.noise(len(courses), g), courses, 0, len(sigmas) - 1, trail=False, counted="evaluated")
        still = torch.zeros(len(sigmas) - 1, dtype=torch.bool)
        images = self.decode(done.last)
        rows = zip(courses, done.x, done.logp.cpu(), images)
        return [Path(c, x, logp, still.clone(), image) for c, x, logp, image in rows]

    # -- the network --------------------------------------------------------------------------------------------------

    def conditions(self, prompts: Sequence[Any]) -> list[Any]:
        """What the network is told of each prompt; encoded once per prompt and kept."""
        keys = [key_of(p) for p in prompts]
        new = list({k: p for k, p in zip(keys, prompts) if k not in self._conditions}.items())
        if new:
            with torch.no_grad():
                found = self.painter.encode([p for _, p in new])
            self.counts["encoded"] += len(new)
            self._bytes += sum(map(bytes_of, found))
            if self._bytes > KEPT:
                self._conditions = {k: self._conditions[k] for k in keys if k in self._conditions}
                self._bytes = sum(map(bytes_of, [*self._conditions.values(), *found]))
            self._conditions.update(zip([k for k, _ in new], found))
        return [self._conditions[k] for k in keys]

    def velocity(self, x: Tensor, sigma: Tensor, prompts: Sequence[Any], *, counted: str) -> Tensor:
        """The guided prediction for latents [P, ...]; `rows` of them at a time when nothing is differentiated."""
        self.counts[counted] += len(x)
        if torch.is_grad_enabled():
            return self._guided(x, sigma, prompts)
        parts = range(0, len(x), self.rows)
        return torch.cat(
            [self._guided(x[i : i + self.rows], sigma[i : i + self.rows], prompts[i : i + self.rows]) for i in parts]
        )

    def _guided(self, x: Tensor, sigma: Tensor, prompts: Sequence[Any]) -> Tensor:
        conditions = self.conditions(prompts)
        guided = self.cfg is not None and self.cfg.scale != 1
        empty = self.conditions([self.cfg.negative]) * len(x) if self.cfg is not None and guided else []
        multiply = nullcontext() if self.linears is None else self.linears()
        with multiply, torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if self.cfg is None or not guided:
                return self.painter.predict(x, sigma, conditions).float()
            if self.cfg.detach:
                # in this order: autocast keeps the weights it has cast, and those cast without gradient pass none on
                c = self.painter.predict(x, sigma, conditions)
                with torch.no_grad():
                    u = self.painter.predict(x, sigma, empty)
            else:
                both = self.painter.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), conditions + empty)
                c, u = both.chunk(2)
            return self.cfg(c.float(), u.float())

    # -- reading log-probabilities ------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Steps:
        """Log-probabilities, means and deviations now, at the trained steps; 0 (deviation 1) elsewhere.

        Rows that stand at the same latent, as the children of one anchor do, share one network call.
        """
        row, t = batch.mask.cpu().nonzero(as_tuple=True)
        paths = batch.paths
        logp, mean, std = self._read([(paths[i], k) for i, k in zip(row.tolist(), t.tolist())])
        at = (row.to(self.device), t.to(self.device))
        B, T = batch.mask.shape
        zeros = torch.zeros(B, T, device=self.device)
        return Steps(
            logp=zeros.index_put(at, logp),
            mean=torch.zeros(B, T, *self.painter.shape, device=self.device).index_put_(at, mean),  # in place: it is large
            std=torch.ones(B, T, device=self.device).index_put(at, std).reshape(B, T, *[1] * len(self.painter.shape)),
        )

    @torch.no_grad()
    def score(self, paths: Sequence[Path]) -> list[Tensor]:
        """The log-probability [T] of every noisy step of each path; 0 at deterministic ones."""
        out = []
        for path in paths:
            noisy = course_of(path).stochastic.nonzero()[:, 0].tolist()
            logp = torch.zeros(len(path))
            if noisy:
                logp[noisy] = self._read([(path, t) for t in noisy])[0].cpu()
            out.append(logp)
        return out

    def _read(self, pairs: list[tuple[Path, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """logp [P], mean [P, ...], std [P] of (path, step) pairs."""
        if not pairs:
            nothing = torch.zeros(0, device=self.device)
            return nothing, nothing.reshape(0, *self.painter.shape), nothing
        for path, t in pairs:
            if not bool(course_of(path).stochastic[t]):
                raise GruppoError(
                    f"step {t} of a path is to be trained, but it draws no noise: its level is "
                    f"{float(course_of(path).levels[t]):g} and its deviation 0; narrow the path's mask to its noisy steps"
                )
        first, whose = shared(pairs)
        kernel = self.fitting(course_of(pairs[0][0]).kernel)
        if any(course_of(p).kernel != kernel for p, _ in pairs):
            raise GruppoError("the paths of one batch were drawn with different kernels; train them in separate batches")
        x = torch.stack([pairs[i][0].steps[pairs[i][1]] for i in first]).to(self.device).float()
        sigma = torch.stack([course_of(p).sigmas[t] for p, t in pairs]).to(self.device).float()
        sigma_next = torch.stack([course_of(p).sigmas[t + 1] for p, t in pairs]).to(self.device).float()
        level = torch.stack([course_of(p).levels[t] for p, t in pairs]).to(self.device).float()
        kind = "forwards" if torch.is_grad_enabled() else "reread"
        v = self.velocity(
            x, sigma[torch.tensor(first, device=self.device)], [course_of(pairs[i][0]).prompt for i in first], counted=kind
        )
        if torch.is_grad_enabled():
            self.counts["trained"] += len(pairs)
        at = torch.tensor(whose, device=self.device)
        after = torch.stack([p.steps[t + 1] for p, t in pairs]).to(self.device).float()
        mean = kernel.mean(x[at], v[at], sigma, sigma_next, level)
        std = kernel.deviation(sigma, sigma_next, level)
        return kernel.logp(after, mean, std), mean, std

    def split(self, batch: Batch, scope: Scope, size: int) -> Iterator[Batch]:
        """Blocks of network calls of at most `size` tokens together; pairs that share a call stay together.

        With scope "step" a row may be cut along its steps; "path" and "group" keep all trained steps of a row or group.
        """
        batch = batch.to(self.device)
        most = max(1, size // (self.painter.tokens * (1 if self.cfg is None else 2)))
        row, t = (index.tolist() for index in batch.mask.cpu().nonzero(as_tuple=True))
        if scope == "group":
            units = [[k for k, r in enumerate(row) if int(batch.group[r]) == i] for i in batch.group.unique().tolist()]
        elif scope == "path":
            units = [[k for k, r in enumerate(row) if r == i] for i in sorted(set(row))]
        else:
            order = sorted(range(len(row)), key=lambda k: (int(batch.group[row[k]]), t[k], row[k]))
            first, whose = shared([(batch.paths[row[k]], t[k]) for k in order])
            units = [[] for _ in first]
            for k, unit in zip(order, whose):
                units[unit].append(k)
        block: list[int] = []
        calls = 0
        for unit in (u for u in units if u):
            cost = 1 if scope == "step" else len(shared([(batch.paths[row[k]], t[k]) for k in unit])[0])
            if block and calls + cost > most:
                yield narrowed(batch, [(row[k], t[k]) for k in block])
                block, calls = [], 0
            block, calls = [*block, *unit], calls + cost
        if block:
            yield narrowed(batch, [(row[k], t[k]) for k in block])


def course_of(path: Path) -> Course:
    """The course under which the path is trained."""
    if not isinstance(path.prompt, Course):
        raise GruppoError(f"the path of a flow policy is trained under a Course, this one under a {type(path.prompt).__name__}")
    return path.prompt


def shared(pairs: Sequence[tuple[Path, int]]) -> tuple[list[int], list[int]]:
    """Which pairs need a network call of their own, and for every pair the number of its call.

    Two pairs share one when prompt, noise level and latent are the same numbers: only equality of the latents themselves
    makes a shared call exact, however the paths came to be.
    """
    first: list[int] = []
    whose: list[int] = []
    known: dict[tuple[Any, ...], list[int]] = {}
    prompts = {id(c): c.prompt for c in (course_of(path) for path, _ in pairs)}
    keys = {i: key_of(prompt) for i, prompt in prompts.items()}
    for k, (path, t) in enumerate(pairs):
        course, x = course_of(path), path.steps[t]
        few = x.flatten()[:4].tolist()
        key = (keys[id(course)], float(course.sigmas[t]), *few)
        for call in known.setdefault(key, []):
            other, s = pairs[first[call]]
            if torch.equal(other.steps[s], x):
                whose.append(call)
                break
        else:
            known[key].append(len(first))
            whose.append(len(first))
            first.append(k)
    return first, whose


def key_of(prompt: Any) -> Hashable:
    """Equal for prompts that say the same.

    Pictures, arrays and tensors count by their numbers: what Python prints of them is cut short or an address, and an address is
    used again.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return type(prompt), frozenset((key_of(k), key_of(v)) for k, v in prompt.items())
    if isinstance(prompt, (list, tuple)):
        return type(prompt), tuple(key_of(part) for part in prompt)
    if isinstance(prompt, Tensor):
        numbers = prompt.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return Tensor, prompt.dtype, tuple(prompt.shape), hashlib.sha256(numbers).digest()
    if hasattr(prompt, "tobytes"):  # PIL, numpy
        form = [getattr(prompt, name, None) for name in ("mode", "size", "shape", "dtype")]
        return type(prompt), str(form), hashlib.sha256(prompt.tobytes()).digest()
    if not isinstance(prompt, Hashable):
        raise GruppoError(
            f"a prompt holds a {type(prompt).__name__}, which cannot be compared; use text, numbers, pictures, tensors"
        )
    return type(prompt), prompt  # kept with its condition, so that no other object gets its address


def bytes_of(condition: Any) -> int:
    """Of all tensors in it."""
    if isinstance(condition, Tensor):
        return condition.nbytes
    parts = condition.values() if isinstance(condition, Mapping) else condition
    return sum(map(bytes_of, parts)) if isinstance(condition, (Mapping, list, tuple)) else 0


def narrowed(batch: Batch, pairs: Sequence[tuple[int, int]]) -> Batch:
    """The rows of these (row, step) pairs, trained at these steps only."""
    keep = torch.zeros_like(batch.mask)
    for r, t in pairs:
        keep[r, t] = True
    mask = batch.mask & keep
    out = replace(batch, mask=mask, weight=torch.where(mask, batch.weight, torch.zeros_like(batch.weight)))
    return out.rows(sorted({r for r, _ in pairs}))
