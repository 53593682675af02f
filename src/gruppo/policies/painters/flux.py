"""FLUX.1: a transformer that predicts velocity on packed latents [patches, 64]; guidance is a number that the network reads.

The grid is 1, (N-1)/N .. 1/N, shifted by the picture's resolution (`schedules.resolution_shifted`). FLUX.1-schnell has no
guidance embedding and no shift; guidance asked of it is classifier-free.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gruppo.policies.painters import Asked
from gruppo.policies.painters.pipeline import PipelinePainter, patched, unpacked
from gruppo.policies.schedules import resolution_shift


class FluxPainter(PipelinePainter):
    """A condition is (T5 embeddings [L, D], pooled CLIP embedding)."""

    pipelines = "FluxPipeline"
    text: ClassVar[int] = 512  # tokens of the T5 encoder
    embedded: ClassVar[float] = 3.5  # guidance when none is asked

    def __init__(self, pipeline: Any, asked: Asked) -> None:
        super().__init__(pipeline, asked)
        scale = self.embedded if asked.guidance is None else float(asked.guidance)
        self.guidance = scale if self.embeds_guidance else None

    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        self.patches = height // 2 * (width // 2)
        self.places = patched(height, width)
        return (self.patches, self.pipeline.transformer.config.in_channels), self.patches + self.text

    def condition(self, prompt: str) -> tuple[Tensor, Tensor]:
        words, pooled, _ = self.pipeline.encode_prompt(prompt, max_sequence_length=self.text)
        return words[0], pooled[0]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        words, pooled = zip(*conditions)
        places = self.places.to(x.device)
        return self.model(
            hidden_states=x.to(self.dtype),
            timestep=sigma,
            guidance=None if self.guidance is None else torch.full_like(sigma, self.guidance),
            pooled_projections=self.stacked(pooled),
            encoder_hidden_states=self.stacked(words),
            txt_ids=places.new_zeros(len(words[0]), 3),
            img_ids=places,
            return_dict=False,
        )[0]

    def pictures(self, x: Tensor) -> list[Any]:
        return super().pictures(unpacked(x, self.height // self.factor, self.width // self.factor))

    def scheduled(self, steps: int) -> Tensor:
        return resolution_scheduled(self, self.patches, steps)


def resolution_scheduled(painter: PipelinePainter, patches: int, steps: int) -> Tensor:
    """1, (N-1)/N .. 1/N through the pipeline's scheduler, told the shift of a picture of this many patches."""
    config = painter.pipeline.scheduler.config
    mu = resolution_shift(patches, (config.base_image_seq_len, config.base_shift), (config.max_image_seq_len, config.max_shift))
    even = list(np.linspace(1.0, 1 / steps, steps))
    return painter.scheduler_for(steps, sigmas=even, mu=mu).sigmas.double()
