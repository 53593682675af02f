"""A small rectified-flow transformer on the pixels of 32 x 32 pictures, told in words what to paint.

    x_sigma = (1 - sigma) picture + sigma noise,     v = noise - picture = (x_sigma - picture) / sigma

The network expects a picture, and the velocity follows from it. Convolutions lead from pixels to 8 x 8 tokens and back, a
transformer stands between them. Noise level and words enter every part through its norms (adaptive layer norm, as in DiT,
2212.09748). There is no autoencoder: a latent is the picture, -1 to 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gruppo.types import GruppoError

PIPELINE = "GlyphPipeline"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class GlyphConfig:
    """The size of the network and the words it knows."""

    words: tuple[str, ...]
    side: int = 32
    channels: int = 48  # of the convolutions, at half the side
    width: int = 128  # of the transformer, at a quarter of the side
    layers: int = 3
    heads: int = 4
    near: int = 2  # convolution blocks before and after the transformer
    hidden: int = 2  # the feed-forward part's width in widths
    longest: int = 8  # words of a prompt
    shift: float = 2.0  # of the grid towards noise
    least: float = 0.2  # noise level below which the velocity is no longer divided by less

    @property
    def tokens(self) -> int:
        return (self.side // 4) ** 2


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, config: GlyphConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.up = nn.Linear(D, config.hidden * D)
        self.down = nn.Linear(config.hidden * D, D)
        self.adapt = nn.Linear(D, 6 * D)
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adapt(c)[:, None].chunk(6, -1)
        B, N, D = x.shape
        h = modulated(x, shift_a, scale_a)
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = torch.addcmul(x, gate_a, self.out(h))
        h = modulated(x, shift_f, scale_f)
        return torch.addcmul(x, gate_f, self.down(F.gelu(self.up(h), approximate="tanh")))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer norm of x, then (1 + scale) and shift"""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Near(nn.Module):
    """Two convolutions of 3 x 3 pixels, shifted and scaled by the condition."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.adapt = nn.Linear(width, 2 * channels)
        for weight in (*self.adapt.parameters(), *self.second.parameters()):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adapt(c)[:, :, None, None].chunk(2, 1)
        h = torch.addcmul(shift, F.group_norm(x, 8), 1 + scale)
        return x + self.second(F.silu(self.first(F.silu(h))))


class GlyphModel(nn.Module):
    """Velocities of pictures [B, 3, side, side] at noise levels [B], for words [B, longest] (0 = no word)."""

    def __init__(self, config: GlyphConfig) -> None:
        super().__init__()
        C, D = config.channels, config.width
        self.config = config
        self.words = nn.Embedding(len(config.words) + 1, D)
        self.read = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.level = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.enter = nn.Conv2d(3, C, 4, stride=2, padding=1)
        self.before = nn.ModuleList(Near(C, D) for _ in range(config.near))
        self.gather = nn.Conv2d(C, D, 2, stride=2)
        self.place = nn.Parameter(places(config))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.adapt = nn.Linear(D, 2 * D)
        self.spread = nn.Linear(D, 4 * C)
        self.after = nn.ModuleList(Near(C, D) for _ in range(config.near))
        self.leave = nn.Conv2d(C, 4 * 3, 3, padding=1)
        nn.init.normal_(self.words.weight, std=0.5)
        for weight in (*self.adapt.parameters(), *self.leave.parameters()):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        n = self.config.side // 4
        said = (self.words(words) * (words > 0)[..., None]).sum(1)  # every word says something else: their order is not needed
        c = F.silu(self.read(said) + self.level(waves(sigma, self.config.width)))
        near = self.enter(x)
        for block in self.before:
            near = block(near, c)
        h = self.gather(near).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adapt(c)[:, None].chunk(2, -1)
        h = self.spread(modulated(h, shift, scale)).transpose(1, 2).unflatten(2, (n, n))
        near = near + F.pixel_shuffle(h, 2)
        for block in self.after:
            near = block(near, c)
        x0 = F.pixel_shuffle(self.leave(F.silu(near)), 2)
        return (x - x0) / sigma.clamp(min=self.config.least)[:, None, None, None]


def waves(position: Tensor, width: int, scale: float = 1000.0, longest: float = 10000.0) -> Tensor:
    """[B] -> [B, width]: cosines and sines of growing wavelength."""
    half = width // 2
    speed = torch.exp(-math.log(longest) * torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = position.float()[:, None] * scale * speed
    return torch.cat([angle.cos(), angle.sin()], 1)


def places(config: GlyphConfig) -> Tensor:
    """[tokens, width]: where a patch stands, rows in one half and columns in the other."""
    n = config.side // 4
    one = waves(torch.arange(n), config.width // 2, scale=1.0, longest=100.0)
    rows, columns = one[:, None].expand(n, n, -1), one[None].expand(n, n, -1)
    return torch.cat([rows, columns], -1).reshape(n * n, -1)


class GlyphPainter:
    """The network as a `Painter`; its latents are the pictures themselves."""

    # What a run trains unless it says otherwise. The layers between pixels and tokens stay: noise is drawn on every pixel, and
    # they would learn what it looked like.
    trained: ClassVar[list[str]] = ["words", "read", "level", "blocks", "adapt"]

    def __init__(self, model: GlyphModel) -> None:
        self.model = model
        self.config = model.config
        self.shape = (3, self.config.side, self.config.side)
        self.tokens = self.config.tokens
        self._number = {word: i + 1 for i, word in enumerate(self.config.words)}

    @staticmethod
    def fresh(config: GlyphConfig, seed: int) -> GlyphPainter:
        """Random weights that depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GlyphPainter(GlyphModel(config).float())

    def encode(self, prompts: list[Any]) -> list[Any]:
        """Word ids [longest] of every prompt; 0 behind the last word. The empty prompt asks for nothing in particular."""
        device = self.model.place.device
        return [self._ids(prompt).to(device) for prompt in prompts]

    def _ids(self, prompt: Any) -> Tensor:
        if not isinstance(prompt, str):
            raise GruppoError(f"this painter's prompts are strings of words, not {type(prompt).__name__}")
        words = prompt.lower().split()
        unknown = [word for word in words if word not in self._number]
        if unknown:
            raise GruppoError(
                f"the painter does not know {', '.join(map(repr, unknown))} of the prompt {prompt!r}; its words are "
                f"{' '.join(self.config.words)}"
            )
        if len(words) > self.config.longest:
            raise GruppoError(f"the prompt {prompt!r} has {len(words)} words, the painter reads {self.config.longest}")
        return torch.tensor([*(self._number[w] for w in words), *[0] * (self.config.longest - len(words))])

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        """v = noise - picture"""
        return self.model(x, sigma, torch.stack(conditions))

    def decode(self, x: Tensor) -> list[Any]:
        """PIL images in RGB; what lies outside 0 to 1 is clamped."""
        from PIL import Image

        pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]

    def sigmas(self, steps: int) -> Tensor:
        """shift u / (1 + (shift - 1) u) for u from 1 to 0"""
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self.config.shift * u / (1 + (self.config.shift - 1) * u)

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """A folder in the layout of a pipeline: model_index.json, config.json, model.safetensors."""
        from safetensors.torch import save_file

        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        weights = {name: w.detach().to("cpu", dtype).contiguous() for name, w in self.model.state_dict().items()}
        save_file(weights, str(into / WEIGHTS))
        (into / WEIGHTS).chmod(0o644)  # safetensors writes weights that only their owner can read
        _write(into / "config.json", asdict(self.config))
        _write(into / "model_index.json", {"_class_name": PIPELINE})

    @staticmethod
    def load(folder: Path | str, device: torch.device | str = "cpu") -> GlyphPainter:
        """The painter that `save` wrote, in float32 whatever the file's precision."""
        config = json.loads((Path(folder) / "config.json").read_text())
        painter = GlyphPainter(GlyphModel(GlyphConfig(**{**config, "words": tuple(config["words"])})))
        painter.restore(folder)
        painter.model.to(device)
        return painter

    def restore(self, folder: Path | str) -> None:
        """The weights of a folder into this painter's network."""
        from safetensors.torch import load_file

        weights = load_file(str(Path(folder) / WEIGHTS))
        own = self.model.state_dict()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise GruppoError(f"{folder} holds the weights of another network: {', '.join(wrong[:3])} do not fit")
        self.model.load_state_dict({name: w.float() for name, w in weights.items()})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
