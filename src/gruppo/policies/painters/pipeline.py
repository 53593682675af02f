"""What all painters of diffusers pipelines share: opening, freezing, guidance, adapters, saving.

A painter of one more pipeline says how a prompt is told to the network, how the network is called, and how latents become
pictures; see docs/painters.md.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gruppo.policies.flow import CFG
from gruppo.policies.painters import Asked
from gruppo.types import GruppoError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class PipelinePainter(ABC):
    """A diffusers pipeline as a `Painter`. Its text encoders and autoencoder are frozen; `model` is its denoising network."""

    pipelines: ClassVar[str]  # the name of the class in diffusers
    network: ClassVar[str] = "transformer"  # the pipeline's component that is trained
    epsilon: ClassVar[bool] = False  # the network predicts noise (kernel DDIM), not velocity
    multiple: ClassVar[int] = 2  # a side of the latent is a multiple of this
    video: ClassVar[bool] = False
    guided: ClassVar[float | None] = None  # the pipeline's own scale of classifier-free guidance
    negative: ClassVar[str] = ""  # what the unguided prediction is told
    rescales_guidance: ClassVar[bool] = False  # the guided prediction keeps the norm of the conditional one
    lora_targets: ClassVar[list[str]] = ATTENTION  # layers that an adapter changes

    at_once: ClassVar[int] = 2**22  # pixels that are decoded together: four pictures of 1024 x 1024

    shape: tuple[int, ...]
    tokens: int

    def __init__(self, pipeline: Any, asked: Asked) -> None:
        self.pipeline, self.asked = pipeline, asked
        self.model: Any = getattr(pipeline, self.network)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(part is self.model)
        self.grid: Callable[[int], Tensor] = self.scheduled  # may be replaced: partial(schedules.linear, shift=3.0)
        if asked.frames is not None and not self.video:
            raise GruppoError(f"{asked.frames} frames were asked for, but {self.pipelines} paints single pictures")
        self.height, self.width = self._size()
        self.pixels = self.height * self.width  # of one picture, or of all frames of a video
        self.shape, self.tokens = self.latent(self.height // self.factor, self.width // self.factor)

    @classmethod
    def load(cls, source: Any, asked: Asked) -> PipelinePainter:
        """From a folder, a hub id or a pipeline object."""
        return cls(opened(source, cls.pipelines, asked), asked)

    # -- what a pipeline must say ---------------------------------------------------------------------------------------

    @abstractmethod
    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        """The shape of one latent, and the length of the network's sequence, for a picture of this many latent pixels."""

    @abstractmethod
    def condition(self, prompt: str) -> Any:
        """What the network is told of one prompt."""

    @abstractmethod
    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        """One call of `self.model`; with gradient."""

    # -- what a pipeline may say otherwise ------------------------------------------------------------------------------

    def pictures(self, x: Tensor) -> list[Any]:
        """PIL images of finished latents [B, C, height, width], through an autoencoder of the class AutoencoderKL."""
        vae = self.pipeline.vae
        x = x.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return self.pipeline.image_processor.postprocess(vae.decode(x, return_dict=False)[0], output_type="pil")

    @property
    def usual(self) -> tuple[int, int]:
        """Height and width in pixels when none are asked."""
        size = getattr(self.pipeline, "default_sample_size", None) or self.model.config.sample_size
        return size * self.factor, size * self.factor

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return self.pipeline.vae_scale_factor

    def scheduled(self, steps: int) -> Tensor:
        """The grid of the pipeline's own scheduler, [steps + 1]."""
        return self.scheduler_for(steps).sigmas.double()

    # -- what follows from it -------------------------------------------------------------------------------------------

    def encode(self, prompts: list[Any]) -> list[Any]:
        """One prompt at a time, so that what the network is told of one does not depend on its neighbours' padding."""
        wrong = next((p for p in prompts if not isinstance(p, str)), None)
        if wrong is not None:
            raise GruppoError(f"the prompts of {self.pipelines} are strings, not {type(wrong).__name__}: {str(wrong)[:80]!r}")
        with torch.no_grad():
            return [_kept(self.condition(p)) for p in prompts]

    def decode(self, x: Tensor) -> list[Any]:
        """PIL images; a few latents at a time, because an autoencoder needs far more memory than the network."""
        with torch.no_grad():
            return [picture for part in x.split(max(1, self.at_once // self.pixels)) for picture in self.pictures(part)]

    def sigmas(self, steps: int) -> Tensor:
        """The grid from noise to picture, in float64."""
        return self.grid(steps).double()

    @property
    def cfg(self) -> CFG | None:
        """The guidance for `FlowPolicy(cfg=...)`: what was asked for, or the pipeline's own; None where there is none."""
        scale = self.guided if self.asked.guidance is None else self.asked.guidance
        if scale is None or scale == 1 or self.embeds_guidance:
            return None
        return CFG(scale, rescale=self.rescales_guidance, negative=self.negative)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network reads the guidance as a number, which needs one call instead of two."""
        return bool(getattr(self.pipeline, self.network).config.get("guidance_embeds", False))

    @property
    def device(self) -> torch.device:
        return getattr(self.pipeline, self.network).device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.pipeline, self.network).dtype

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """Conditions where the network stands, in its dtype."""
        return torch.stack(list(tensors)).to(self.device, self.dtype)

    def scheduler_for(self, steps: int, *, sigmas: list[float] | None = None, mu: float | None = None) -> Any:
        """A copy of the pipeline's scheduler, set to this many steps, with its own levels before the shift if not given."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        given = {"sigmas": sigmas, "mu": mu}
        scheduler.set_timesteps(steps, **{k: v for k, v in given.items() if v is not None})
        return scheduler

    def _size(self) -> tuple[int, int]:
        size = self.usual if self.asked.size is None else self.asked.size
        height, width = (size, size) if isinstance(size, int) else size
        unit = self.factor * self.multiple
        if height < unit or width < unit or height % unit or width % unit:
            raise GruppoError(f"a picture of {height} x {width} pixels was asked for; {self.pipelines} needs multiples of {unit}")
        return height, width

    # -- weights --------------------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> bool:
        """Whether `model` was wrapped into a peft adapter: `painter.model = get_peft_model(painter.model, LoraConfig(...))`."""
        return hasattr(self.model, "peft_config") and hasattr(self.model, "disable_adapter")

    def save(self, folder: Path) -> None:
        """The whole pipeline; of an adapter, the file that diffusers' `load_lora_weights` reads and peft's own."""
        if not self.adapted:
            self.pipeline.save_pretrained(str(folder))
            return
        from peft import get_peft_model_state_dict

        own = self.model.peft_config["default"]
        own.base_model_name_or_path = own.base_model_name_or_path or getattr(self.pipeline, "name_or_path", None)
        weights = {
            k.removeprefix("base_model.model."): v
            for k, v in get_peft_model_state_dict(self.model, save_embedding_layers=False).items()
        }
        # without the adapter's config beside the weights diffusers would scale them by 1 instead of alpha / rank
        config = _plain(own.to_dict())
        layers, told = f"{self.network}_lora_layers", f"{self.network}_lora_adapter_metadata"
        self.pipeline.save_lora_weights(str(folder), **{layers: weights, told: config})
        self.model.save_pretrained(str(folder), save_embedding_layers=False)  # these networks have none

    def restore(self, folder: Path) -> None:
        """The weights, or the adapter, that `save` wrote, into this painter."""
        if self.adapted:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))
            return
        saved = type(self.model).from_pretrained(str(folder), subfolder=self.network, **told_dtype(self.dtype))
        self.model.load_state_dict(saved.state_dict())


def opened(source: Any, name: str, asked: Asked) -> Any:
    """The pipeline of this class; its autoencoder in float32, because rewards see what it decodes."""
    import diffusers

    if not isinstance(source, (str, Path)):
        return source.to(asked.device)
    kind = getattr(diffusers, name)
    try:
        pipeline = kind.from_pretrained(str(source), **told_dtype({"default": asked.dtype, "vae": torch.float32}))
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GruppoError(f"cannot load {str(source)!r} as a {name}: {reason}") from error
    return pipeline.to(asked.device)


def told_dtype(dtype: Any) -> dict[str, Any]:
    """The precision under the name that this diffusers has for it: `dtype` since 0.40, when `torch_dtype` began to warn."""
    import diffusers

    major, minor = (int(n) for n in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 40) else "torch_dtype": dtype}


def named_on_the_hub(source: str) -> Any:
    """The class of the pipeline that the hub holds under this id."""
    try:
        return index_of(source).get("_class_name")
    except ModuleNotFoundError as error:
        raise GruppoError(f"{source} is no folder here, and to ask the hub: pip install gruppo[images]") from error
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GruppoError(f"cannot load {source!r} from the hub, and there is no folder of that name here: {reason}") from error


def index_of(source: Any) -> dict[str, Any]:
    """The model_index.json of a folder or a hub id."""
    import diffusers

    kind: Any = diffusers.DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
    return kind.load_config(str(source))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[L_i, D] rows as [B, L, D] and the mask [B, L] of what is real; None where all are equally long."""
    longest = max(len(r) for r in rows)
    out = torch.stack([torch.cat([r, r.new_zeros(longest - len(r), r.shape[1])]) for r in rows])
    real = torch.arange(longest, device=out.device) < torch.tensor([len(r) for r in rows], device=out.device)[:, None]
    return out, None if bool(real.all()) else real


def patched(height: int, width: int) -> Tensor:
    """(0, row, column) of every 2 x 2 patch, [patches, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def unpacked(x: Tensor, height: int, width: int) -> Tensor:
    """[B, patches, 4 C] -> [B, C, height, width] latent pixels"""
    B, _, C = x.shape
    x = x.reshape(B, height // 2, width // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C // 4, height, width)


def _kept(condition: Any) -> Any:
    """A condition in the memory of the host: thousands of prompts are kept, at some megabytes each."""
    return condition.cpu() if isinstance(condition, Tensor) else tuple(part.cpu() for part in condition)


def _plain(value: Any) -> Any:
    """A peft config as JSON can hold it: sets become sorted lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return sorted(value) if isinstance(value, (set, frozenset)) else value
