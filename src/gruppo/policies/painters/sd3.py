"""Stable Diffusion 3 and 3.5: a transformer on 2 x 2 patches that predicts velocity; three text encoders.

The grid is the scheduler's: equal steps between shifted ends, shifted again (`schedules.twice_shifted`). Timesteps are
1000 sigma. Flow-GRPO (2505.05470) trains SD3.5-M at 512 pixels in 10 steps with guidance 4.5.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from gruppo.policies.painters.pipeline import PipelinePainter
from gruppo.policies.schedules import resolution_shift


class SD3Painter(PipelinePainter):
    """A condition is (embeddings of all three encoders [L, D], pooled embedding)."""

    pipelines = "StableDiffusion3Pipeline"
    guided = 7.0
    text: ClassVar[int] = 256  # tokens of the T5 encoder; the CLIP encoders add theirs

    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        config = self.pipeline.transformer.config
        self.patches = (height // config.patch_size) * (width // config.patch_size)
        return (config.in_channels, height, width), self.patches + self.pipeline.tokenizer_max_length + self.text

    def condition(self, prompt: str) -> tuple[Tensor, Tensor]:
        words, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text
        )
        return words[0], pooled[0]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        words, pooled = zip(*conditions)
        return self.model(
            hidden_states=x.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=self.stacked(words),
            pooled_projections=self.stacked(pooled),
            return_dict=False,
        )[0]

    def scheduled(self, steps: int) -> Tensor:
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return self.scheduler_for(steps).sigmas.double()
        low, high = (config.base_image_seq_len, config.base_shift), (config.max_image_seq_len, config.max_shift)
        return self.scheduler_for(steps, mu=resolution_shift(self.patches, low, high)).sigmas.double()
