"""From a run's description to its policy, for models that write and for models that paint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from gruppo.policies.flow import CFG, FlowPolicy, Painter
from gruppo.policies.load import load_model, load_tokenizer, lora_config, train_only, with_adapter
from gruppo.policies.token import TokenPolicy
from gruppo.recipes import find
from gruppo.runs.config import RunConfig
from gruppo.types import GruppoError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL = [""]  # what every name begins with
DENOISING_STEPS = 10  # of training, where neither the run nor its world says so (Flow-GRPO's number)


def world_of(config: RunConfig) -> Any:
    """The world the run names, or None."""
    if config.world is None:
        return None
    from gruppo.worlds import WORLDS

    return WORLDS[config.world]


def source_of(config: RunConfig, model: Any = None) -> Any:
    """The model of a run: the object given, the one it names, or its world's."""
    world = world_of(config)
    return model if model is not None else config.model or (world.base if world is not None else None)


def paints(config: RunConfig, model: Any = None) -> bool:
    """Whether the run's model is an image model: its folder is a pipeline's, or, off this disk, its recipe is for images."""
    source = source_of(config, model)
    if isinstance(source, (str, Path)):
        folder = Path(source).expanduser()
        if folder.is_dir():
            # a pipeline, or an adapter of one in the format of diffusers
            return any((folder / name).exists() for name in ("model_index.json", "pytorch_lora_weights.safetensors"))
        return not config.recipe.endswith(".pickle") and find(config.recipe).family == "image"
    return isinstance(source, Painter)


def build_policy(config: RunConfig, model: Any = None, tokenizer: Any = None, peft_config: Any = None) -> Any:
    """The policy with its initial weights, and with the tools of its world where it has some."""
    if peft_config is not None and config.policy.trained is not None:
        raise GruppoError(
            f"policy.trained is {config.policy.trained} and a peft_config is given, but beside an adapter no weight of the model "
            "trains; remove one of them"
        )
    if paints(config, model):
        _fits(config, "image")
        if config.policy.engine is not None:
            raise GruppoError(
                f"policy.engine {config.policy.engine.name} samples text, but the model of this run paints; remove it"
            )
        return painting_policy(config, model, peft_config)
    _fits(config, "text")
    if config.policy.compile:
        raise GruppoError(
            "policy.compile is for image models: the shapes of a text model's forward differ from call to call, and each would "
            "be compiled anew; remove it"
        )
    own, world, source = config.policy, world_of(config), source_of(config, model)
    loaded = load_model(source, dtype=DTYPES[own.dtype], device=own.device)
    named = source if isinstance(source, (str, Path)) else getattr(source, "name_or_path", "")
    words = load_tokenizer(tokenizer if tokenizer is not None else config.tokenizer or named)
    if peft_config is not None:
        loaded = with_adapter(loaded, peft_config, config.fit.seed)
    elif own.lora is not None:
        loaded = with_adapter(loaded, lora_config(own.lora.rank, own.lora.alpha, own.lora.targets), config.fit.seed)
    elif own.trained is not None:
        train_only(loaded, own.trained)
    policy = TokenPolicy(
        loaded,
        words,
        temperature=own.temperature,
        max_new=own.max_new_tokens,
        autocast=torch.bfloat16 if own.autocast else None,
        checkpointing=own.gradient_checkpointing,
        sample_rows=own.sample_rows,
        sample_tokens=own.sample_tokens,
        onednn=own.onednn,
        graphs=own.graphs,
    )
    policy = with_engine(policy, config)
    return policy if world is None else world.equipped(policy)


def with_engine(policy: TokenPolicy, config: RunConfig) -> Any:
    """The policy, its completions sampled by the run's engine where it names one."""
    own, engine = config.policy, config.policy.engine
    if engine is None:
        return policy
    from gruppo.policies.engines import Sampler, adapted
    from gruppo.policies.engines.http import Remote

    dtype = engine.dtype or ("bfloat16" if own.autocast else own.dtype)
    if engine.url is not None:
        made: Any = Remote(engine.url, timeout=engine.timeout)
    else:
        from gruppo.policies.engines.vllm import Inside

        rank = max((c.r for c in policy.model.peft_config.values()), default=0) if adapted(policy.model) else 0
        made = Inside(
            policy.config,
            policy.tokenizer,
            dtype=dtype,
            memory=engine.memory,
            rows=own.sample_rows,
            rank=0 if engine.merge else rank,
            timeout=engine.timeout,
        )
    return Sampler(policy, made, dtype=DTYPES[dtype], merge=engine.merge)


def _fits(config: RunConfig, family: str) -> None:
    """A sentence when the recipe is made for another kind of model."""
    if config.recipe.endswith(".pickle"):
        return
    made = find(config.recipe)
    if (made.family == "image") != (family == "image"):
        kind = {"image": "paints", "text": "writes"}[family]
        others = "flow-grpo, mix-grpo, dance-grpo" if family == "image" else "grpo, dapo, rloo"
        raise GruppoError(
            f"the recipe {made.nickname} is for {made.family} models, but the model of this run {kind}; recipes for it are "
            f"{others} and others (gruppo list)"
        )


def painting_policy(config: RunConfig, model: Any, peft_config: Any) -> FlowPolicy:
    """A painter as the policy of the run."""
    from gruppo.policies.painters import load_painter

    own, source = config.policy, source_of(config, model)
    painter = source
    if not isinstance(painter, Painter):
        painter = load_painter(
            source, dtype=DTYPES[own.dtype], device=own.device, size=own.size, frames=own.frames, guidance=own.guidance
        )
    if own.gradient_checkpointing:
        enable = getattr(painter.model, "enable_gradient_checkpointing", None)
        if enable is None:
            raise GruppoError(
                f"policy.gradient_checkpointing is on, but a {type(painter.model).__name__} cannot compute its layers a second "
                "time; remove it, and lower fit.token_budget instead"
            )
        enable()
    if peft_config is not None:
        painter.model = with_adapter(painter.model, peft_config, config.fit.seed)
    elif own.lora is not None:
        usual = getattr(painter, "lora_targets", None)
        if usual is None:
            raise GruppoError(
                f"policy.lora is set, but a {type(painter).__name__} names no lora_targets and its checkpoints hold no adapter; "
                "remove it, and train a part of the weights with policy.trained instead"
            )
        targets = usual if own.lora.targets == "all-linear" else own.lora.targets
        adapter = lora_config(own.lora.rank, own.lora.alpha, targets, None)
        painter.model = with_adapter(painter.model, adapter, config.fit.seed)
    else:
        train_only(painter.model, getattr(painter, "trained", ALL) if own.trained is None else own.trained)
    if own.compile:
        compiled(painter.model)
    embedded = getattr(painter, "embeds_guidance", False)  # the network reads the scale itself and needs one call, not two
    cfg = None
    if own.guidance is not None and own.guidance != 1 and not embedded:
        negative, rescale = getattr(painter, "negative", ""), getattr(painter, "rescales_guidance", False)
        cfg = CFG(own.guidance, own.detach_unconditional, rescale, negative)
    return FlowPolicy(
        painter,
        steps=own.denoising_steps or DENOISING_STEPS,
        eval_steps=own.eval_denoising_steps,
        cfg=cfg,
        rows=own.sample_rows,
        autocast=torch.bfloat16 if own.autocast else None,
        onednn=False if own.compile else own.onednn,  # the compiler chooses its own products
    )


def compiled(network: torch.nn.Module) -> None:
    """The network's calls go through torch.compile; names and checkpoints stay as they are."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if next(network.parameters()).device.type == "cpu" and not any(map(shutil.which, names)):
        raise GruppoError(
            f"policy.compile is on, but there is no C++ compiler here ({' or '.join(names)}), which torch.compile needs on a "
            "CPU; install one, or remove policy.compile"
        )
    network.compile()
