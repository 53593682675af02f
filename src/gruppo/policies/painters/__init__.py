"""Networks that paint, one file per pipeline; a folder says in `model_index.json` which of them reads it.

Only the files in this folder import diffusers, and only when a pipeline of theirs is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gruppo.policies.flow import Painter
from gruppo.types import GruppoError


@dataclass(frozen=True)
class Asked:
    """What a person asks of a painter; None leaves it to the pipeline."""

    dtype: torch.dtype = torch.float32  # of the network and the text encoders
    device: torch.device | str = "cpu"
    size: int | tuple[int, int] | None = None  # pixels: the side of a square, or (height, width)
    frames: int | None = None  # of a video
    guidance: float | None = None  # 1 = none


Load = Callable[[Any, Asked], Any]  # a folder, a hub id, or a pipeline object


def glyph(source: Any, asked: Asked) -> Any:
    """The painter of the world `glyphs`."""
    from gruppo.policies.painters.glyph import GlyphPainter

    return GlyphPainter.load(source, asked.device)


def sd3(source: Any, asked: Asked) -> Painter:
    """Stable Diffusion 3 and 3.5."""
    from gruppo.policies.painters.sd3 import SD3Painter

    return SD3Painter.load(source, asked)


def flux(source: Any, asked: Asked) -> Painter:
    """FLUX.1."""
    from gruppo.policies.painters.flux import FluxPainter

    return FluxPainter.load(source, asked)


def qwen(source: Any, asked: Asked) -> Painter:
    """Qwen-Image."""
    from gruppo.policies.painters.qwen import QwenPainter

    return QwenPainter.load(source, asked)


def wan(source: Any, asked: Asked) -> Painter:
    """Wan 2.1, text to video."""
    from gruppo.policies.painters.wan import WanPainter

    return WanPainter.load(source, asked)


def sd1(source: Any, asked: Asked) -> Painter:
    """Stable Diffusion 1 and 2."""
    from gruppo.policies.painters.sd1 import SD1Painter

    return SD1Painter.load(source, asked)


PAINTERS: dict[str, Load] = {  # `_class_name` of model_index.json -> loader
    "GlyphPipeline": glyph,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "QwenImagePipeline": qwen,
    "WanPipeline": wan,
    "StableDiffusionPipeline": sd1,
}


def load_painter(
    source: Any,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    guidance: float | None = None,
) -> Painter:
    """The painter of a pipeline: a folder, a hub id, a pipeline object, or the folder of an adapter that this package saved."""
    asked = Asked(dtype, device, size, frames, guidance)
    if not isinstance(source, (str, Path)):
        return _loader(type(source).__name__, "the given object is a")(source, asked)
    path = Path(source).expanduser()
    index = path / "model_index.json"
    if index.is_file():
        name = json.loads(index.read_text()).get("_class_name")
        # resolved, because an adapter that is saved later names its pipeline by this path
        return _loader(name, f"{index} names the pipeline")(path.resolve(), asked)
    if (path / "adapter_config.json").is_file():
        return _merged(path, asked)
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise GruppoError(f"{source} holds no model_index.json, so it is not a folder of a model that paints")
    from gruppo.policies.painters.pipeline import named_on_the_hub

    return _loader(named_on_the_hub(str(source)), f"{source} on the hub is a")(str(source), asked)


def on_the_hub(source: Any) -> bool:
    """Whether this is the id of a pipeline on the hub, or of one that was downloaded from it."""
    if not isinstance(source, str) or source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).exists():
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(source, "model_index.json")
    except (OSError, ValueError):  # no such file there, no such id, or nobody to ask: whoever loads it says which
        return False
    return True


def _loader(name: Any, told: str) -> Load:
    if name not in PAINTERS:
        raise GruppoError(
            f"{told} {name!r}, for which there is no painter; there are painters for {', '.join(PAINTERS)}. "
            "docs/painters.md shows how another one is added"
        )

    def load(source: Any, asked: Asked) -> Painter:
        try:
            return PAINTERS[name](source, asked)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "diffusers":
                raise
            raise GruppoError(f"{name} is a pipeline of diffusers, which is not installed: pip install gruppo[images]") from error

    return load


def _merged(folder: Path, asked: Asked) -> Painter:
    """The base pipeline of an adapter, with the adapter merged into its network."""
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise GruppoError(f"{folder} holds an adapter that does not say of which model; load its pipeline and restore it there")
    painter = load_painter(base, asked.device, dtype=asked.dtype, size=asked.size, frames=asked.frames, guidance=asked.guidance)
    PeftModel.from_pretrained(painter.model, str(folder)).merge_and_unload()  # in place: the pipeline keeps its network
    return painter
