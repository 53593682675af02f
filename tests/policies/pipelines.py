"""diffusers' own pipelines with random weights and a few thousand parameters, built without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WORDS = ["a", "red", "green", "blue", "circle", "square", "cat", "dog", "of", "and", "two", "Describe", "the", "image"]


def tokenizer(length: int = 16) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def clip(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=32,
        max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int = 32, kind: str = "T5EncoderModel") -> Any:
    import transformers

    config = {"vocab_size": 32, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    if kind == "T5EncoderModel":
        return transformers.T5EncoderModel(transformers.T5Config(**config, pad_token_id=0, eos_token_id=1))
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**config, pad_token_id=0, eos_token_id=1))


def kl(channels: int, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    )  # fmt: skip


def sd3(**scheduler: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=kl(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True), tokenizer_2=tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux(guided: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guided,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    return FluxPipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(**shift),  # type: ignore[arg-type]
        vae=kl(4, scaling_factor=0.36, shift_factor=0.11),
        text_encoder=clip(False), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


def qwen() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[2.0, -3.0, 1.0, 4.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    language = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 32, "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4,
            }, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=network, vae=vae, text_encoder=Qwen2_5_VLForConditionalGeneration(language), tokenizer=tokenizer(1100),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=1.0, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )  # fmt: skip


def wan(scheduler: Any = None) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
    )  # fmt: skip
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    if scheduler is None:  # at order 1 without corrector UniPC's step is Euler's
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
            disable_corrector=list(range(100)),
        )  # fmt: skip
    return WanPipeline(
        transformer=network, vae=vae, scheduler=scheduler, tokenizer=tokenizer(), text_encoder=t5(kind="UMT5EncoderModel")
    )


def sd1(**scheduler: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, dropout=0.3,
    )  # fmt: skip
    noise = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": False, "clip_sample": False, **scheduler,
    }  # fmt: skip
    return StableDiffusionPipeline(
        unet=network, scheduler=DDIMScheduler(**noise), vae=kl(4, scaling_factor=0.18215), text_encoder=clip(False),
        tokenizer=tokenizer(), safety_checker=None, feature_extractor=None, image_encoder=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )  # fmt: skip


def auraflow() -> Any:
    """The pipeline of the example in docs/painters.md."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    network = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return AuraFlowPipeline(
        tokenizer=tokenizer(), text_encoder=t5(kind="UMT5EncoderModel"), vae=kl(4, scaling_factor=0.13), transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {"sd3": sd3, "flux": flux, "qwen": qwen, "wan": wan, "sd1": sd1}


def tiny(build: Callable[[], Any], seed: int = 0) -> Any:
    """The pipeline with weights of this seed, none of them 0: an untrained last layer would hide every mistake before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = build()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for weight in part.parameters():
                    if weight.dim() < 2:
                        weight.data += 0.2 * torch.randn_like(weight)
                    elif not bool(weight.any()):
                        weight.data = 0.2 * torch.randn_like(weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
