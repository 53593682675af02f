"""Stable Diffusion 1 and 2: a UNet that predicts epsilon at whole timesteps; the kernel is `DDIM`, sigma is sqrt(1 - abar).

Folders name other schedulers (PNDM); their noise levels are walked with DDIM's steps, as DanceGRPO (2505.07818) does for
SD 1.4. A network that predicts "v" (Stable Diffusion 2.1) is read as the epsilon that v stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gruppo.policies.kernels import over
from gruppo.policies.painters import Asked
from gruppo.policies.painters.pipeline import PipelinePainter
from gruppo.types import GruppoError


class SD1Painter(PipelinePainter):
    """A condition is the CLIP encoder's hidden states [77, D]."""

    pipelines = "StableDiffusionPipeline"
    network = "unet"
    epsilon = True
    multiple = 1
    guided = 7.5

    def __init__(self, pipeline: Any, asked: Asked) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        super().__init__(pipeline, asked)
        self.ddim: Any = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
        self.levels = (1 - self.ddim.alphas_cumprod.double()).sqrt()  # [1000], ascending
        predicts = self.ddim.config.prediction_type
        if predicts not in ("epsilon", "v_prediction"):
            raise GruppoError(f"the network predicts {predicts!r}; there is a painter for 'epsilon' and 'v_prediction'")
        self.velocity = predicts == "v_prediction"
        if float(self.levels[-1]) >= 1:
            raise GruppoError(
                "the scheduler begins at pure noise (rescale_betas_zero_snr), where epsilon says nothing of a picture"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise GruppoError("this UNet reads its guidance as an embedding (a distilled model); there is no painter for that")

    def latent(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        return (self.pipeline.unet.config.in_channels, height, width), height * width

    def condition(self, prompt: str) -> Tensor:
        words, _ = self.pipeline.encode_prompt(prompt, self.pipeline.device, 1, False)
        return words[0]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        out = self.model(
            x.to(self.dtype), self.timestep(sigma), encoder_hidden_states=self.stacked(conditions), return_dict=False
        )[0]
        if not self.velocity:
            return out
        return over((1 - sigma.double().square()).sqrt(), out) * out + over(sigma, out) * x.to(out)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep whose noise level is nearest."""
        levels = self.levels.to(sigma.device)
        return (sigma.double()[:, None] - levels).abs().argmin(1)

    def scheduled(self, steps: int) -> Tensor:
        self.ddim.set_timesteps(steps)
        path = self.ddim.timesteps.cpu()
        end = int(path[-1]) - len(self.levels) // steps
        last = self.levels[end] if end >= 0 else (1 - self.ddim.final_alpha_cumprod.double()).sqrt()
        return torch.cat([self.levels[path], last.reshape(1)])
