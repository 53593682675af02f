"""Models in and out: any transformers causal LM by hub id, folder or object; out as plain folders. Nothing is ever pushed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gruppo.types import GruppoError


def load_model(source: Any, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A causal LM from a hub id or folder; an adapter folder comes back merged into its base; an object comes back moved."""
    if not isinstance(source, (str, Path)):
        return source.to(device)
    from transformers import AutoModelForCausalLM

    path = Path(source).expanduser()
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        from peft import PeftModel

        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        return PeftModel.from_pretrained(load_model(base, dtype=dtype, device=device), str(path)).merge_and_unload()
    return _from_disk_or_hub(source, lambda: AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)).to(device)


def load_tokenizer(source: Any) -> Any:
    """The tokenizer of a hub id or folder, reading `tokenizer.json` as it stands where the folder says so; or the object."""
    if not isinstance(source, (str, Path)):
        return source
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source).expanduser()
    config = path / "tokenizer_config.json"
    if config.exists() and (path / "tokenizer.json").exists():
        declared = json.loads(config.read_text()).get("tokenizer_class")
        # AutoTokenizer rebuilds some model types' own pre-tokenizer around the vocabulary (qwen2 among them), whatever the
        # folder declares: the same text would silently become other ids than the model was trained on.
        if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(str(path))
    return _from_disk_or_hub(source, lambda: AutoTokenizer.from_pretrained(str(source)))


def _from_disk_or_hub(source: Any, load: Callable[[], Any]) -> Any:
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / f).exists() for f in ("config.json", "tokenizer_config.json", "adapter_config.json")):
        raise GruppoError(f"{path} is not a transformers model folder: it holds no config.json")
    if not path.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") > 1):
        raise GruppoError(f"the model folder {path} does not exist (looked from {Path.cwd()})")
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "from this folder" if path.exists() else "from the hub, and there is no folder of that name here"
        raise GruppoError(f"cannot load {str(source)!r} {where}: {reason}") from error


def with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    """The model with a fresh peft adapter whose random part depends on the seed alone."""
    from peft import get_peft_model

    # peft draws A from torch's global generator; it is put back as it was
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config)


def lora_config(rank: int, alpha: float, targets: str | list[str], task: str | None = "CAUSAL_LM") -> Any:
    """peft's LoraConfig without dropout, which would make the ratio differ from 1 before the first update."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type=task)  # pyright: ignore[reportArgumentType]


def train_only(model: Any, beginnings: list[str]) -> None:
    """Freeze every weight whose name does not begin with one of these."""
    weights = dict(model.named_parameters())
    unknown = [b for b in beginnings if not any(name.startswith(b) for name in weights)]
    if unknown or not beginnings:
        parts = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in weights))
        raise GruppoError(
            f"policy.trained {unknown or beginnings}: no weight's name begins so; names of this {type(model).__name__} begin "
            f"with {', '.join(parts[:12])}{' and others' if len(parts) > 12 else ''}"
        )
    for name, weight in weights.items():
        weight.requires_grad_(weight.requires_grad and name.startswith(tuple(beginnings)))


def ignored_sampling(model: Any, temperature: float) -> str | None:
    """A sentence when the model's generation_config asks for a sampling that training does not use."""
    config = getattr(model, "generation_config", None)
    asked = {
        name: value
        for name, neutral in (("temperature", (1.0, None)), ("top_p", (1.0, None)), ("top_k", (0, None)))
        if (value := getattr(config, name, None)) not in neutral
    }
    asked = {k: v for k, v in asked.items() if (k, v) != ("temperature", temperature)}
    if not asked:
        return None
    told = ", ".join(f"{k} {v}" for k, v in asked.items())
    return (
        f"the model's generation_config asks for {told}; it is ignored: paths are sampled from the full distribution at "
        f"policy.temperature {temperature}, the one whose log-probabilities are trained"
    )


def save(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """A plain transformers folder, or peft's adapter folder (and `merged/` beside it when asked)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if merge and hasattr(model, "merge_and_unload"):
        # on a copy: merging and unmerging in place would not give the same bits back
        copy.deepcopy(model).merge_and_unload().save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")


def restore(model: Any, folder: Path) -> None:
    """Put a saved folder's weights, or adapter, into a model that was built the same way."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    saved = load_model(folder, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())
