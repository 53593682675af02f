"""A prompt with a picture, shared by a group: the packed forward beside the ordinary one of the same Qwen2-VL (random weights).

The policy for text reads no pictures yet, so this uses `policies.prefix` as such: rows of embeddings with the picture's features
in them, and rotary positions of three axes. TRL would need a processor from the hub, hence the ordinary forward of transformers
is what it is compared with; both sides run the vision tower once, and both multiply by torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gruppo.policies import prefix
from gruppo.types import GruppoError

G = 8


@dataclass(frozen=True)
class Picture:
    """A prompt of a picture of `height` x `width` merged patches and `text` tokens, G completions of `steps` tokens."""

    height: int = 28
    width: int = 32
    text: int = 128
    steps: int = 32
    hidden: int = 256
    layers: int = 4

    @property
    def name(self) -> str:
        return f"{self.height * self.width}+{self.text}/{self.steps}, picture and text"


def network(work: Picture) -> Any:
    """A random Qwen2-VL; the same weights each time."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": work.hidden, "patch_size": 4}
    text: dict[str, Any] = {"hidden_size": work.hidden, "intermediate_size": 3 * work.hidden, "num_hidden_layers": work.layers}
    text |= {"num_attention_heads": work.hidden // 64, "num_key_value_heads": 2, "vocab_size": 2 * work.hidden}
    text |= {"bos_token_id": None, "eos_token_id": None}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


class Sides:
    """Both ways to the log-probabilities [G, steps] of one group."""

    def __init__(self, work: Picture) -> None:
        self.work, self.model = work, network(work)
        g = torch.Generator().manual_seed(1)
        vocab = self.model.config.text_config.vocab_size
        patches = 4 * work.height * work.width  # the tower merges 2 x 2 of them
        self.pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=g)
        self.grid = torch.tensor([[1, 2 * work.height, 2 * work.width]])
        image, size = work.height * work.width, max(work.height, work.width)
        prompt = torch.cat([torch.full((image,), vocab - 1), torch.randint(0, vocab - 1, (work.text,), generator=g)])
        self.steps = torch.randint(0, vocab - 1, (G, work.steps), generator=g)
        self.advantage = torch.randn(G, 1, generator=g)
        self.rows = [torch.cat([prompt, s[:-1]]) for s in self.steps]  # the last token predicts nothing
        at = torch.arange(image)
        picture = torch.stack([torch.zeros_like(at), at // work.width, at % work.width])
        self.place = torch.cat([picture, (size + torch.arange(len(self.rows[0]) - image)).expand(3, -1)], 1)
        self.reads = len(prompt) - 1  # position that predicts the first step
        self.image = image

    def _embedded(self, ids: Tensor, features: Tensor) -> Tensor:
        """[B, L, hidden]; every row begins with the picture."""
        words = self.model.model.language_model.embed_tokens(ids[:, self.image :])
        return torch.cat([features.expand(len(ids), -1, -1), words], 1)

    def _features(self) -> Tensor:
        out = self.model.model.visual(self.pixels, grid_thw=self.grid)
        return getattr(out, "pooler_output", out)

    def _read(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).log_softmax(-1).gather(-1, self.steps[..., None])[..., 0]

    def ordinary(self) -> Tensor:
        text = self.model.model.language_model
        x = self._embedded(torch.stack(self.rows), self._features())
        place = self.place[:, None].expand(-1, G, -1)
        return self._read(text(inputs_embeds=x, position_ids=place, use_cache=False).last_hidden_state[:, self.reads :])

    def shared(self) -> Tensor:
        text, layout = self.model.model.language_model, prefix.lay(self.rows)
        x = self._embedded(layout.pick(self.rows)[None], self._features())
        place = layout.pick([self.place] * G)[:, None]
        with prefix.attending(text.config):
            out = text(inputs_embeds=x, position_ids=place, use_cache=False, prefix_layout=layout).last_hidden_state[0]
        return self._read(torch.stack([out[torch.from_numpy(spots[self.reads :])] for spots in layout.spots]))

    def train(self, read: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and the gradient of the advantages' sum over them."""
        self.model.zero_grad(set_to_none=True)
        logp = read()
        (logp * self.advantage).mean().backward()
        return logp.detach(), torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def compare(work: Picture = Picture(), rounds: int = 2) -> dict[str, Any]:
    """Equality first, then milliseconds of both sides in alternation."""
    from gruppo.bench import seconds

    sides = Sides(work)
    (logp, grad), (same, other) = sides.train(sides.ordinary), sides.train(sides.shared)
    apart = {"logp": float((logp - same).abs().max()), "gradient": float((grad - other).norm() / grad.norm())}
    if not max(apart.values()) <= 1e-5:
        raise GruppoError(f"{work.name}: the packed forward and the ordinary one differ: {apart}; nothing was timed")
    spent: dict[str, list[float]] = {"ordinary": [], "shared": []}
    for n in range(rounds):
        for name in sorted(spent, reverse=bool(n % 2)):
            spent[name].append(seconds(lambda name=name: sides.train(getattr(sides, name))))
    ratio = [a / b for a, b in zip(spent["ordinary"], spent["shared"])]
    ms = {name: 1000 * median(some) for name, some in spent.items()}
    return {"work": work.name, "apart": apart, "ms": ms, "ratio": [median(ratio), min(ratio), max(ratio)]}


def table(found: dict[str, Any]) -> list[str]:
    """Its lines of the page."""
    ratio = found["ratio"]
    return [
        "A picture in the shared prompt: Qwen2-VL with random weights, its text half of 3.4 M parameters, three rotary axes.",
        "Forward and backward with prefixes shared (`gruppo.policies.prefix`; gruppo's policy for text reads no pictures yet)",
        "beside the ordinary forward of transformers, not TRL, which needs a processor from the hub. Both run the vision tower",
        f"once and multiply by torch's own products; log-probabilities and gradient agree to {max(found['apart'].values()):.0e}.",
        "",
        "| prompt/completion | ordinary ms | shared ms | ratio (min..max) |",
        "|---|---|---|---|",
        f"| {found['work']} | {found['ms']['ordinary']:.0f} | {found['ms']['shared']:.0f} | "
        f"{ratio[0]:.2f} ({ratio[1]:.2f}..{ratio[2]:.2f}) |",
        "",
    ]
