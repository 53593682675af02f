"""A random CLIP of a few thousand weights and plain pictures, made without any file or network."""

from __future__ import annotations

import string
from typing import Any

import torch
from PIL import Image

SIZE = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}


def tiny_clip(seed: int = 0) -> Any:
    """One layer each, embeddings of 8 numbers."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": 60, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": SIZE, "patch_size": 16},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        for p in model.parameters():  # the usual initial weights are so small that every prompt looks alike
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.3)
    return model


def tiny_tools() -> tuple[Any, Any]:
    """A tokenizer of single letters and the PIL image processor."""
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    vocab = {name: i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    side = {"height": SIZE, "width": SIZE}
    return tokenizer, CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side)


def picture(colour: str = "red", size: int = 40) -> Image.Image:
    """A square of one colour."""
    return Image.new("RGB", (size, size), COLOURS[colour])


def noise(size: int = 40, seed: int = 0) -> Image.Image:
    """A picture that no compression makes small."""
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
