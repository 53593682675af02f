"""Wan 2.1, text to video: a transformer that predicts velocity on latents [channels, frames, height, width].

The deterministic step of a walk is Euler's. The scheduler of the published folders, UniPC, gives the grid; its own steps look
back at two predictions, so pictures of few steps differ from the pipeline's. A video is a list of PIL images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from gruppo.policies.painters import Asked
from gruppo.policies.painters.pipeline import PipelinePainter, index_of
from gruppo.policies.painters.qwen import spread
from gruppo.types import GruppoError

JUST_BELOW = 1e-4  # 1000 sigma of a whole timestep may come back from float32 as 899.99998


class WanPainter(PipelinePainter):
    """A condition is the prompt's embeddings, padded with zeros to [512, D]."""

    pipelines = "WanPipeline"
    video = True
    guided = 5.0
    text: ClassVar[int] = 512
    length: ClassVar[int] = 81  # frames when none are asked

    def __init__(self, pipeline: Any, asked: Asked) -> None:
        refused(pipeline.config)
        super().__init__(pipeline, asked)
        # UniPC tells the network whole timesteps, the Euler scheduler broken ones
        self.whole = not self.scheduler_for(2).timesteps.is_floating_point()

    @classmethod
    def load(cls, source: Any, asked: Asked) -> PipelinePainter:
        if isinstance(source, (str, Path)):
            refused(index_of(source))
        return super().load(source, asked)

    @property
    def factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def usual(self) -> tuple[int, int]:
        return 480, 832

    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        frames, every = self.asked.frames or self.length, self.pipeline.vae_scale_factor_temporal
        if frames < 1 or frames % every != 1 % every:
            raise GruppoError(f"{frames} frames were asked for; this Wan paints 1, {1 + every}, {1 + 2 * every} .. frames")
        config = self.pipeline.transformer.config
        self.pixels = self.height * self.width * frames
        kept = (frames - 1) // every + 1
        t, h, w = config.patch_size
        return (config.in_channels, kept, height, width), (kept // t) * (height // h) * (width // w)

    def condition(self, prompt: str) -> Tensor:
        words, _ = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=self.text)
        return words[0]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        whole = (1000 * sigma.double() + JUST_BELOW).floor().long()
        return self.model(
            hidden_states=x.to(self.dtype),
            timestep=whole if self.whole else 1000 * sigma,
            encoder_hidden_states=self.stacked(conditions),
            return_dict=False,
        )[0]

    def pictures(self, x: Tensor) -> list[Any]:
        vae = self.pipeline.vae
        video = vae.decode(spread(vae, x), return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(video, output_type="pil")


def refused(config: Mapping[str, Any]) -> None:
    """A sentence for the networks of Wan 2.2; the index says enough, and nothing large is loaded before it is read."""
    has = {name: (config.get(name) or (None, None))[1] is not None for name in ("transformer", "transformer_2")}
    if has["transformer_2"] or not has["transformer"]:
        raise GruppoError("this Wan has two networks, one for high and one for low noise; there is a painter for one")
    if config.get("expand_timesteps"):
        raise GruppoError("this Wan tells every token its own timestep (text-image-to-video); there is no painter for that")
