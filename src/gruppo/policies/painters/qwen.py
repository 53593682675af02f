"""Qwen-Image: a transformer that predicts velocity on packed latents; a language model reads the prompt, however long it is.

Classifier-free guidance gives the guided prediction the norm of the conditional one. The grid is FLUX's with other numbers,
stretched to end at the scheduler's `shift_terminal`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gruppo.policies.painters import Asked
from gruppo.policies.painters.flux import resolution_scheduled
from gruppo.policies.painters.pipeline import PipelinePainter, padded, unpacked
from gruppo.types import GruppoError


class QwenPainter(PipelinePainter):
    """A condition is the prompt's hidden states [L, D]; in one call they are padded and masked."""

    pipelines = "QwenImagePipeline"
    guided = 4.0
    negative = " "
    rescales_guidance = True

    def __init__(self, pipeline: Any, asked: Asked) -> None:
        super().__init__(pipeline, asked)
        if self.embeds_guidance:
            raise GruppoError("this Qwen-Image reads its guidance as a number; there is a painter for the one that does not")

    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        self.patches = height // 2 * (width // 2)
        self.area = [(1, height // 2, width // 2)]
        return (self.patches, self.pipeline.transformer.config.in_channels), self.patches

    def condition(self, prompt: str) -> Tensor:
        words, _ = self.pipeline.encode_prompt(prompt)
        return words[0]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        words, real = padded(conditions)
        return self.model(
            hidden_states=x.to(self.dtype),
            timestep=sigma,
            encoder_hidden_states=words.to(x.device, self.dtype),
            encoder_hidden_states_mask=None if real is None else real.to(x.device),
            img_shapes=[self.area] * len(x),
            return_dict=False,
        )[0]

    def pictures(self, x: Tensor) -> list[Any]:
        vae = self.pipeline.vae
        x = unpacked(x, self.height // self.factor, self.width // self.factor)[:, :, None]
        return self.pipeline.image_processor.postprocess(
            vae.decode(spread(vae, x), return_dict=False)[0][:, :, 0], output_type="pil"
        )

    def scheduled(self, steps: int) -> Tensor:
        return resolution_scheduled(self, self.patches, steps)


def spread(vae: Any, x: Tensor) -> Tensor:
    """Latents [B, C, frames, h, w] with the mean and deviation that the autoencoder gave each channel."""
    x = x.to(vae.device, vae.dtype)
    mean, std = (torch.tensor(v).to(x).reshape(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return x * std + mean
