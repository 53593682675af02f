"""Painters of real diffusers pipelines with random weights: they paint what the pipeline paints, train, and save."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from tests.policies.pipelines import PIPELINES, auraflow, flux, sd1, sd3, tiny, wan
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.policies.flow import CFG, Course, FlowPolicy
from gruppo.policies.kernels import CPS, DDIM, DPMSolver2M, FlowSDE, Kernel
from gruppo.policies.load import lora_config, with_adapter
from gruppo.policies.painters import PAINTERS, load_painter, on_the_hub
from gruppo.policies.painters.flux import FluxPainter
from gruppo.policies.painters.sd3 import SD3Painter
from gruppo.policies.painters.wan import WanPainter
from gruppo.policies.schedules import ddim, linear, resolution_shifted, scaled_linear_abar, twice_shifted, unipc
from gruppo.types import Batch, Group, GruppoError, Path, Task

PROMPTS = ["a red cat", "two dog of green circle and blue square"]
STEPS = 4
CFGS = {"sd3": CFG(4.5), "flux": None, "qwen": CFG(4.0, rescale=True, negative=" "), "wan": CFG(5.0), "sd1": CFG(7.5)}


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of 16 tokens instead of 512: padding is most of these prompts, and most of the time."""
    for painter in (SD3Painter, FluxPainter, WanPainter):
        monkeypatch.setattr(painter, "text", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FilePath]:
    """Every tiny pipeline as diffusers saves it."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in PIPELINES.items():
        tiny(build).save_pretrained(str(root / name))
    return {name: root / name for name in PIPELINES}


def painter_of(name: str, source: Any, **asked: Any) -> Any:
    sizes = {"wan": {"size": 32, "frames": 5}}
    return load_painter(source, **{"size": (16, 24), **sizes.get(name, {}), **asked})


def kernel_of(painter: Any) -> Kernel:
    return DDIM(eta=1.0) if painter.epsilon else FlowSDE(0.7)


def seeded(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def still(policy: FlowPolicy, x: Tensor, prompts: list[str], kernel: Kernel, steps: int = STEPS) -> Tensor:
    """Painted without noise."""
    sigmas = policy.painter.sigmas(steps)
    return policy.walk(x, [Course.of(p, sigmas, kernel, ()) for p in prompts], 0, steps).last


def asked_of_pipeline(name: str, painter: Any, prompt: str, x: Tensor, cfg: CFG | None, kind: str = "latent") -> Any:
    """What the pipeline's own __call__ paints from the same noise."""
    pipeline = painter.pipeline
    how: dict[str, Any] = {"height": painter.height, "width": painter.width, "num_inference_steps": STEPS, "output_type": kind}
    if cfg is not None:
        how |= {"true_cfg_scale" if name == "qwen" else "guidance_scale": cfg.scale, "negative_prompt": cfg.negative}
    elif name == "flux":
        how |= {"guidance_scale": painter.guidance or 0.0}
    else:
        how |= {"true_cfg_scale" if name == "qwen" else "guidance_scale": 1.0}
    if name == "wan":
        how |= {"num_frames": 5}
    if hasattr(painter, "text"):
        how |= {"max_sequence_length": painter.text}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, latents=x, **how)[0]


# -- what is painted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_walk_without_noise_is_the_pipelines_own_call(name: str, guided: bool, folders: dict[str, FilePath]) -> None:
    painter = painter_of(name, folders[name])
    cfg = CFGS[name] if guided else None
    policy = FlowPolicy(painter, steps=STEPS, cfg=cfg)
    x = policy.noise(2, seeded(1))
    ours = still(policy, x, PROMPTS, kernel_of(painter))
    for prompt, noise, found in zip(PROMPTS, x, ours):
        told = asked_of_pipeline(name, painter, prompt, noise[None], cfg)[0]
        assert told.shape == found.shape == painter.shape
        torch.testing.assert_close(found, told, atol=1e-4, rtol=0)
    # the comparison would see a wrong prompt: other words, other picture
    other = still(policy, x[:1], PROMPTS[1:], kernel_of(painter))[0]
    assert float((other - ours[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_the_pipelines_own(name: str, folders: dict[str, FilePath], monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    painter = painter_of(name, folders[name])
    policy = FlowPolicy(painter, steps=STEPS)
    x = policy.noise(1, seeded(2))
    ours = policy.decode(still(policy, x, PROMPTS[:1], kernel_of(painter)))
    told = asked_of_pipeline(name, painter, PROMPTS[0], x, None, kind="pil")
    monkeypatch.setattr(type(painter), "at_once", 1)  # one latent at a time
    again = policy.decode(still(policy, x.repeat(2, *[1] * (x.dim() - 1)), PROMPTS[:1] * 2, kernel_of(painter)))
    assert len(again) == 2
    assert isinstance(again[1], list) == (name == "wan")
    ours, told = (ours[0], told[0]) if name == "wan" else (ours, told)
    assert len(ours) == len(told) == (5 if name == "wan" else 1)
    for a, b in zip(ours, told):
        assert a.size == b.size == (painter.width, painter.height)
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", PIPELINES)
def test_sampling_takes_the_kernel_that_the_network_needs(name: str, folders: dict[str, FilePath]) -> None:
    painter = painter_of(name, folders[name])
    policy = FlowPolicy(painter, steps=2, eval_steps=STEPS)
    path = policy.sample(PROMPTS[:1], g=seeded(3))[0]
    told = asked_of_pipeline(name, painter, PROMPTS[0], policy.noise(1, seeded(3)), None)[0]
    torch.testing.assert_close(path.steps[-1], told, atol=1e-4, rtol=0)
    assert not path.mask.any()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_picture_does_not_depend_on_its_neighbours(name: str, folders: dict[str, FilePath]) -> None:
    """Prompts of different length in one call, and noise levels of different steps."""
    painter = painter_of(name, folders[name])
    policy = FlowPolicy(painter, steps=STEPS)
    x, sigma = policy.noise(2, seeded(4)), painter.sigmas(STEPS)[[0, 2]].float()
    conditions = policy.conditions(PROMPTS)
    with torch.no_grad():
        both = painter.predict(x, sigma, conditions)
        alone = [painter.predict(x[i : i + 1], sigma[i : i + 1], conditions[i : i + 1])[0] for i in (0, 1)]
    torch.testing.assert_close(both, torch.stack(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.conditions(PROMPTS[::-1])[1], conditions[0])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sd3", twice_shifted(10, 3.0)),
        ("flux", resolution_shifted(10, 0.5 - 0.65 * (256 - 24) / 3840)),  # 16 x 24 pixels are 4 x 6 patches
        ("qwen", resolution_shifted(10, 0.5 - 0.4 * (256 - 24) / 7936, terminal=0.02)),
        ("wan", unipc(10, 3.0)),
        ("sd1", ddim(scaled_linear_abar(), 10)),
    ],
)
def test_grids_are_the_formulas(name: str, told: Tensor, folders: dict[str, FilePath]) -> None:
    painter = painter_of(name, folders[name])
    assert painter.sigmas(10).dtype == torch.float64
    torch.testing.assert_close(painter.sigmas(10), told, atol=1e-6, rtol=0)


def test_a_method_may_bring_its_own_grid(folders: dict[str, FilePath]) -> None:
    painter = painter_of("sd3", folders["sd3"])
    painter.grid = partial(linear, shift=3.0)
    assert FlowPolicy(painter, steps=10).sigmas.tolist() == linear(10, 3.0).tolist()


# -- training -------------------------------------------------------------------------------------------------------------


def group_of(policy: FlowPolicy, n: int = 3, seed: int = 5, noisy: tuple[int, ...] = (0, 1, 2)) -> Group:
    """Paths of one prompt drawn with noise at some steps."""
    course = Course.of(PROMPTS[0], policy.sigmas, kernel_of(policy.painter), noisy)
    walk = policy.walk(policy.noise(n, seeded(seed)), [course], 0, STEPS, g=seeded(seed + 1))
    advantage = torch.linspace(-1, 1, n)[:, None].expand(n, STEPS)
    paths = [Path(course, x, logp, course.stochastic) for x, logp in zip(walk.x, walk.logp)]
    return Group(Task(PROMPTS[0]), paths, advantage=advantage, reward=advantage[:, 0])


def loss_of(policy: FlowPolicy, batch: Batch) -> Tensor:
    """A policy gradient whose ratios are 1 where nothing was trained yet."""
    now = policy.evaluate(batch)
    return -((now.logp - batch.logp_old).exp() * batch.advantage * batch.mask).sum()


def prediction(painter: Any, seed: int = 9) -> Tensor:
    x = torch.randn(2, *painter.shape, generator=seeded(seed))
    with torch.no_grad():
        return painter.predict(x, painter.sigmas(STEPS)[1:3].float(), painter.encode(PROMPTS))


def adapted(painter: Any) -> None:
    """A LoRA adapter whose alpha is not its rank, so that a lost scale shows."""
    painter.model = with_adapter(painter.model, lora_config(4, 12.0, painter.lora_targets, None), 0)


def trained(painter: Any, cfg: CFG | None, steps: int = 2) -> Tensor:
    """Two optimizer steps on one group; says that everything but the network stayed as it was."""
    policy = FlowPolicy(painter, steps=STEPS, cfg=cfg)
    batch = collate([group_of(policy)])
    with torch.no_grad():
        again = policy.evaluate(batch)
    assert bool(batch.mask.any())
    torch.testing.assert_close(again.logp[batch.mask], batch.logp_old[batch.mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(policy.score(batch.paths))[batch.mask], batch.logp_old[batch.mask], atol=1e-5, rtol=0)
    parts = {n: p for n, p in painter.pipeline.components.items() if isinstance(p, torch.nn.Module) and n != painter.network}
    before = {n: [w.clone() for w in p.parameters()] for n, p in parts.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-2)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(policy, batch)
        loss.backward()
        first = loss.detach() if first is None else first
        optimizer.step()
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())
    for n, part in parts.items():
        assert all(p.grad is None and not p.requires_grad for p in part.parameters()), n
        assert all(torch.equal(a, b) for a, b in zip(before[n], part.parameters())), n
        assert not part.training
    assert not painter.model.training
    assert first is not None
    assert float(loss_of(policy, batch).detach()) < float(first)
    return prediction(painter)


@pytest.mark.parametrize("name", PIPELINES)
def test_full_weights_train_are_saved_and_load_in_diffusers(name: str, folders: dict[str, FilePath], tmp_path: FilePath) -> None:
    import diffusers

    painter = painter_of(name, folders[name])
    untrained = prediction(painter)
    found = trained(painter, CFGS[name])
    assert float((found - untrained).abs().max()) > 1e-3
    painter.save(tmp_path)
    pipeline = getattr(diffusers, painter.pipelines).from_pretrained(str(tmp_path))
    torch.testing.assert_close(prediction(painter_of(name, pipeline)), found, atol=1e-5, rtol=0)
    other = painter_of(name, folders[name])
    other.restore(tmp_path)
    assert torch.equal(prediction(other), found)
    assert other.pipeline.components[other.network] is other.model


@pytest.mark.parametrize("name", PIPELINES)
def test_adapters_train_are_saved_and_load_in_diffusers(name: str, folders: dict[str, FilePath], tmp_path: FilePath) -> None:
    import diffusers

    painter = painter_of(name, folders[name])
    untrained = prediction(painter)
    adapted(painter)
    torch.testing.assert_close(prediction(painter), untrained, atol=1e-6, rtol=0)
    found = trained(painter, CFGS[name])
    assert float((found - untrained).abs().max()) > 1e-3
    with painter.model.disable_adapter():
        torch.testing.assert_close(prediction(painter), untrained, atol=1e-6, rtol=0)
    painter.save(tmp_path)

    pipeline = getattr(diffusers, painter.pipelines).from_pretrained(str(folders[name]))
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(prediction(painter_of(name, pipeline)), found, atol=1e-5, rtol=0)

    resumed = painter_of(name, folders[name])
    adapted(resumed)
    resumed.restore(tmp_path)
    assert torch.equal(prediction(resumed), found)

    merged = painter_of(name, tmp_path)  # the adapter's folder names the pipeline it belongs to
    torch.testing.assert_close(prediction(merged), found, atol=1e-5, rtol=0)


def test_dropout_would_be_off_even_if_a_network_has_some(folders: dict[str, FilePath]) -> None:
    painter = painter_of("sd1", folders["sd1"])
    painter.model.train()
    assert not torch.equal(prediction(painter), prediction(painter))
    FlowPolicy(painter, steps=STEPS)
    assert torch.equal(prediction(painter), prediction(painter))


def test_gradient_checkpointing_gives_the_same_gradient(folders: dict[str, FilePath]) -> None:
    found = []
    for checkpointing in (False, True):
        painter = painter_of("sd3", folders["sd3"])
        if checkpointing:
            painter.model.enable_gradient_checkpointing()
        policy = FlowPolicy(painter, steps=STEPS)
        loss_of(policy, collate([group_of(policy)])).backward()
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found))


# -- guidance ---------------------------------------------------------------------------------------------------------------


def gradient(policy: FlowPolicy, prompts: list[str], weight: Tensor) -> Tensor:
    """d sum(weight * v) / d parameters, at one latent."""
    policy.model.zero_grad()
    x = torch.randn(1, *policy.painter.shape, generator=seeded(7))
    v = policy.velocity(x, policy.sigmas[1:2].float(), prompts, counted="forwards")
    (weight * v).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["sd3", "qwen", "sd1"])
def test_guidance_sends_gradient_through_both_branches_or_one(name: str, folders: dict[str, FilePath]) -> None:
    """v = (1 - s) u + s c, so dv = (1 - s) du + s dc, and s dc alone when the unconditional branch is detached."""
    s, painter = 3.0, painter_of(name, folders[name])
    weight = torch.randn(1, *painter.shape, generator=seeded(8))

    def of(cfg: CFG | None, prompt: str = PROMPTS[0]) -> Tensor:
        return gradient(FlowPolicy(painter, steps=STEPS, cfg=cfg), [prompt], weight)

    c, u = of(None), of(None, "blue square")
    told = {"atol": 1e-4 * float(c.abs().max()), "rtol": 0}
    torch.testing.assert_close(of(CFG(s, negative="blue square")), (1 - s) * u + s * c, **told)
    torch.testing.assert_close(of(CFG(s, negative="blue square", detach=True)), s * c, **told)
    assert float(u.norm()) > 0.1 * float(c.norm())


def test_detached_guidance_passes_nothing_on() -> None:
    c, u = (torch.ones(1, 4, requires_grad=True) for _ in range(2))
    CFG(3.0, detach=True)(c, u).sum().backward()
    assert u.grad is None
    assert c.grad is not None
    assert c.grad.tolist() == [[3.0] * 4]


def test_rescaled_guidance_has_the_conditional_norm(folders: dict[str, FilePath]) -> None:
    painter = painter_of("qwen", folders["qwen"])
    x, sigma = torch.randn(1, *painter.shape, generator=seeded(7)), painter.sigmas(STEPS)[1:2].float()

    def of(cfg: CFG | None) -> Tensor:
        return FlowPolicy(painter, steps=STEPS, cfg=cfg).velocity(x, sigma, PROMPTS[:1], counted="sampled").detach()

    plain, guided, rescaled = of(None), of(CFG(4.0, negative=" ")), of(CFG(4.0, rescale=True, negative=" "))
    torch.testing.assert_close(rescaled.norm(dim=-1), plain.norm(dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(rescaled / rescaled.norm(dim=-1, keepdim=True), guided / guided.norm(dim=-1, keepdim=True))
    assert float((guided.norm(dim=-1) - plain.norm(dim=-1)).abs().max()) > 1e-3


def test_autocast_keeps_the_gradient_beside_a_detached_branch(folders: dict[str, FilePath]) -> None:
    painter = painter_of("sd3", folders["sd3"])
    weight = torch.randn(1, *painter.shape, generator=seeded(8))
    full, half = (
        gradient(FlowPolicy(painter, steps=STEPS, cfg=CFG(3.0, detach=True), autocast=cast), PROMPTS[:1], weight)
        for cast in (None, torch.bfloat16)
    )
    assert torch.nn.functional.cosine_similarity(full, half, 0) > 0.98


def test_prompts_are_encoded_outside_of_autocast(folders: dict[str, FilePath], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words must be told the same way, whether they are asked for or avoided."""
    painter = painter_of("sd3", folders["sd3"])
    seen: list[bool] = []
    condition = painter.condition
    monkeypatch.setattr(painter, "condition", lambda p: (seen.append(torch.is_autocast_enabled("cpu")), condition(p))[1])
    policy = FlowPolicy(painter, steps=STEPS, cfg=CFG(3.0), autocast=torch.bfloat16)
    still(policy, policy.noise(1, seeded(0)), PROMPTS[:1], FlowSDE(), 1)
    assert seen == [False, False]


def test_guidance_that_a_painter_proposes(folders: dict[str, FilePath]) -> None:
    assert painter_of("sd3", folders["sd3"]).cfg == CFG(7.0)
    assert painter_of("qwen", folders["qwen"], guidance=2.5).cfg == CFG(2.5, rescale=True, negative=" ")
    assert painter_of("wan", folders["wan"], guidance=1.0).cfg is None
    painter = painter_of("flux", folders["flux"])
    assert painter.cfg is None
    assert painter.embeds_guidance
    assert painter.guidance == 3.5
    other = painter_of("flux", folders["flux"], guidance=1.5)
    assert float((prediction(painter) - prediction(other)).abs().max()) > 1e-3


# -- variants of the pipelines ------------------------------------------------------------------------------------------------


def same_as_pipeline(name: str, painter: Any, cfg: CFG | None = None) -> None:
    policy = FlowPolicy(painter, steps=STEPS, cfg=cfg)
    x = policy.noise(1, seeded(1))
    told = asked_of_pipeline(name, painter, PROMPTS[0], x, cfg)
    torch.testing.assert_close(still(policy, x, PROMPTS[:1], kernel_of(painter)), told, atol=1e-4, rtol=1e-5)


def test_flux_without_guidance_embedding() -> None:
    painter = painter_of("flux", tiny(partial(flux, guided=False)))
    assert not painter.embeds_guidance
    same_as_pipeline("flux", painter)
    assert painter_of("flux", tiny(partial(flux, guided=False)), guidance=2.0).cfg == CFG(2.0)


def test_stable_diffusion_3_with_a_shift_by_resolution() -> None:
    same_as_pipeline("sd3", painter_of("sd3", tiny(partial(sd3, use_dynamic_shifting=True))))


def test_wan_with_broken_timesteps() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    painter = painter_of("wan", tiny(partial(wan, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))))
    assert not painter.whole
    same_as_pipeline("wan", painter)


@pytest.mark.parametrize(
    "how", [{"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}]
)
def test_stable_diffusion_1_with_other_settings(how: dict[str, Any]) -> None:
    same_as_pipeline("sd1", painter_of("sd1", tiny(partial(sd1, **how))), CFG(3.0))


def test_stable_diffusion_1_is_walked_with_ddim_whatever_its_scheduler(folders: dict[str, FilePath]) -> None:
    from diffusers import PNDMScheduler

    painter = painter_of("sd1", folders["sd1"])
    pipeline = tiny(sd1)
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "clip_sample"}  # such folders do not name it
    pipeline.scheduler = PNDMScheduler.from_config(config)
    other = painter_of("sd1", pipeline)
    assert torch.equal(painter.sigmas(10), other.sigmas(10))
    assert torch.equal(prediction(painter), prediction(other))


def test_every_timestep_is_found_from_its_noise_level_in_float32(folders: dict[str, FilePath]) -> None:
    painter = painter_of("sd1", folders["sd1"])
    assert painter.timestep(painter.levels.float()).tolist() == list(range(1000))


def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/painters.md adds a pipeline; it paints what that pipeline paints, guided and not, decodes and trains."""
    text = (FilePath(__file__).parents[2] / "docs" / "painters.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "class " in part)
    monkeypatch.setitem(PAINTERS, "AuraFlowPipeline", PAINTERS["FluxPipeline"])  # given back afterwards
    exec(code, {"__name__": "example"})
    painter = painter_of("auraflow", tiny(auraflow))
    same_as_pipeline("auraflow", painter, CFG(1.0))
    assert painter.cfg == CFG(3.5)
    same_as_pipeline("auraflow", painter, painter.cfg)
    picture = FlowPolicy(painter, steps=STEPS).sample(PROMPTS[:1], g=seeded(1))[0].output
    assert picture.size == (24, 16)
    adapted(painter)
    trained(painter, painter.cfg)


def test_the_table_of_the_docs_names_every_pipeline() -> None:
    text = (FilePath(__file__).parents[2] / "docs" / "painters.md").read_text()
    named = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `") and "Pipeline`" in line]
    assert sorted(named) == sorted(PAINTERS)


@pytest.mark.parametrize("name", PIPELINES)
def test_half_precision_trains_what_it_samples(name: str, folders: dict[str, FilePath]) -> None:
    """bfloat16 network and text encoders, float32 latents and autoencoder."""
    painter, full = (painter_of(name, folders[name], dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert painter.dtype == painter.pipeline.text_encoder.dtype == torch.bfloat16
    assert painter.pipeline.vae.dtype == torch.float32
    near = torch.nn.functional.cosine_similarity(prediction(painter).flatten().float(), prediction(full).flatten(), 0)
    assert float(near) > 0.99
    adapted(painter)
    policy = FlowPolicy(painter, steps=STEPS)
    group = group_of(policy)
    assert policy.decode(group.paths[0].steps[-1:])
    batch = collate([group])
    loss = loss_of(policy, batch)
    loss.backward()
    assert all(p.dtype == torch.float32 for p in policy.parameters())  # an adapter's steps of 1e-4 would be rounded away
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())
    torch.testing.assert_close(policy.evaluate(batch).logp[batch.mask].detach(), batch.logp_old[batch.mask], atol=2e-2, rtol=0)


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_kernels_of_the_other_kind_are_refused(folders: dict[str, FilePath]) -> None:
    for name, kernel in (("sd1", FlowSDE()), ("sd1", CPS()), ("sd3", DDIM())):
        policy = FlowPolicy(painter_of(name, folders[name]), steps=STEPS)
        with pytest.raises(GruppoError, match=f"the kernel is {type(kernel).__name__}, but this network predicts"):
            still(policy, policy.noise(1, seeded(0)), PROMPTS[:1], kernel)
        group = group_of(policy)
        for path in group.paths:
            path.prompt = Course(path.prompt.prompt, kernel, path.prompt.sigmas, path.prompt.levels)
        with pytest.raises(GruppoError, match=f"the kernel is {type(kernel).__name__}"):
            policy.evaluate(collate([group]))
    policy = FlowPolicy(painter_of("sd1", folders["sd1"]), steps=STEPS)
    course = Course.of(PROMPTS[0], policy.sigmas, DDIM(), ())
    with pytest.raises(GruppoError, match="DPMSolver2M solves rectified flows"):
        policy.walk(policy.noise(1, seeded(0)), [course], 0, 1, solver=DPMSolver2M())


def test_what_a_pipeline_cannot_paint_is_refused(folders: dict[str, FilePath]) -> None:
    with pytest.raises(GruppoError, match=r"16 x 18 pixels was asked for; StableDiffusion3Pipeline needs multiples of 4"):
        painter_of("sd3", folders["sd3"], size=(16, 18))
    with pytest.raises(GruppoError, match="5 frames were asked for, but FluxPipeline paints single pictures"):
        painter_of("flux", folders["flux"], frames=5)
    with pytest.raises(GruppoError, match=r"6 frames were asked for; this Wan paints 1, 5, 9"):
        painter_of("wan", folders["wan"], frames=6)
    with pytest.raises(GruppoError, match="prompts of StableDiffusion3Pipeline are strings, not list"):
        painter_of("sd3", folders["sd3"]).encode([["a"]])
    with pytest.raises(GruppoError, match="begins at pure noise"):
        painter_of("sd1", tiny(partial(sd1, rescale_betas_zero_snr=True)))
    with pytest.raises(GruppoError, match="the network predicts 'sample'"):
        painter_of("sd1", tiny(partial(sd1, prediction_type="sample")))
    two = tiny(wan)
    two.register_modules(transformer_2=two.transformer)
    with pytest.raises(GruppoError, match="two networks"):
        painter_of("wan", two)
    each = tiny(wan)
    each.register_to_config(expand_timesteps=True)
    with pytest.raises(GruppoError, match="every token its own timestep"):
        painter_of("wan", each)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}, "two networks"),
        ({"transformer_2": [None, None], "expand_timesteps": True}, "every token its own timestep"),
    ],
)
def test_wan_2_2_is_refused_before_its_weights_are_read(
    index: dict[str, Any], sentence: str, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], **index}
    (tmp_path / "model_index.json").write_text(json.dumps(told))  # and no weights beside it
    with pytest.raises(GruppoError, match=sentence):
        load_painter(tmp_path)
    monkeypatch.setattr("gruppo.policies.painters.pipeline.index_of", lambda source: told)
    monkeypatch.setattr("gruppo.policies.painters.wan.index_of", lambda source: told)
    with pytest.raises(GruppoError, match=sentence):
        load_painter("somebody/wan-2.2")


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionXLPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "FluxKontextPipeline",
        "FluxFillPipeline",
        "Flux2Pipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "WanImageToVideoPipeline",
    ],
)
def test_kin_of_the_pipelines_are_refused_by_their_own_name(name: str, tmp_path: FilePath) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(GruppoError, match=f"names the pipeline '{name}', for which there is no painter"):
        load_painter(tmp_path)


def test_a_pipeline_on_the_hub_is_told_from_a_text_model(monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, str]] = []

    def download(source: str, name: str) -> str:
        asked.append((source, name))
        if source != "somebody/some-pipeline":
            raise LocalEntryNotFoundError("neither there nor kept")
        return "model_index.json"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert on_the_hub("somebody/some-pipeline")
    assert not on_the_hub("somebody/some-words")
    assert asked == [(f"somebody/some-{kind}", "model_index.json") for kind in ("pipeline", "words")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "folder").mkdir(parents=True)
    assert not any(map(on_the_hub, ("a/folder", "./nowhere", "~/nowhere", "word", "a/b/c", None, tmp_path)))
    assert len(asked) == 2


def test_sources_without_a_painter_are_refused_with_a_sentence(tmp_path: FilePath) -> None:
    with pytest.raises(GruppoError, match=r"holds no model_index\.json, so it is not a folder of a model that paints"):
        load_painter(tmp_path)
    with pytest.raises(GruppoError, match=r"holds no model_index\.json"):
        load_painter(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogViewPipeline"}))
    with pytest.raises(GruppoError, match="'CogViewPipeline', for which there is no painter") as told:
        load_painter(tmp_path)
    assert all(name in str(told.value) for name in PAINTERS)
    with pytest.raises(GruppoError, match="the given object is a 'dict'"):
        load_painter({})
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(GruppoError, match=r"cannot load .* as a FluxPipeline"):
        load_painter(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(GruppoError, match="does not say of which model"):
        load_painter(tmp_path / "adapter")


def test_without_diffusers_the_command_that_installs_it_is_told(
    folders: dict[str, FilePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("sd3", "sd1"):
        with pytest.raises(GruppoError, match=r"pip install gruppo\[images\]"):
            load_painter(folders[name], size=16)
    with pytest.raises(GruppoError, match=r"pip install gruppo\[images\]"):
        load_painter("somebody/some-pipeline")


def test_the_registry_and_the_policy_need_no_diffusers() -> None:
    import subprocess

    code = "import sys, gruppo.policies.painters, gruppo.policies.schedules; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
