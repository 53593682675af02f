"""vLLM for real, on whatever device there is: `make test-vllm`. Tiny random models, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs.small import Quiet, files, silent
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from gruppo.policies.engines import Ask, Sampler, weights_of
from gruppo.policies.engines import vllm as inside
from gruppo.policies.engines.http import Remote
from gruppo.policies.engines.vllm import Inside
from gruppo.policies.load import lora_config, with_adapter
from gruppo.policies.reference import snapshot, swapped
from gruppo.policies.token import TokenPolicy
from gruppo.runs.config import assemble, merge
from gruppo.runs.session import Session
from gruppo.types import GruppoError
from gruppo.types import Path as Sampled

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vllm's own
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here; `make test-vllm`"),
]

MEMORY = 0.01  # share of this machine's memory: what a tiny model needs, many times over
SIZES: dict[str, dict[str, Any]] = {  # head sizes that vllm has kernels for
    "qwen3": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128},
}
MOST = 1e-3  # nats between vllm and transformers in float32 for these models; what is found is printed
PROMPTS: list[Tensor] = [
    torch.randint(5, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 7, 20, 20, 33, 130)
] * 3


def policy_of(family: str = "qwen3", *, seed: int = 0, tied: bool = True, lora: bool = False, dtype: Any = None) -> TokenPolicy:
    model = tiny_model(family, seed=seed, **SIZES[family], **({} if tied else {"tie_word_embeddings": False}))
    if dtype is not None:
        model = model.to(dtype)
    if lora:
        model = with_adapter(model, lora_config(4, 8.0, "all-linear"), seed)
        stir(model, seed, "lora_B")
    return TokenPolicy(model, tiny_tokenizer(), temperature=0.8, max_new=24)


def engine_of(policy: TokenPolicy, **numbers: Any) -> Inside:
    return Inside(policy.config, policy.tokenizer, **{"memory": MEMORY, "rows": 64, "timeout": 120.0, **numbers})


def stir(model: Any, seed: int, part: str = "") -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.add_(0.1 * torch.randn(p.shape, generator=g).to(p))


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def ids(paths: Sequence[Sampled]) -> list[list[int]]:
    return [p.steps.tolist() for p in paths]


def gaps(policy: Any, paths: Sequence[Sampled]) -> Tensor:
    return torch.cat([(p.logp - read).abs() for p, read in zip(paths, policy.score(paths))])


def report(what: str, gap: Tensor) -> None:
    print(f"gap of vllm to transformers, {what}: at most {gap.max():.1e}, mean {gap.mean():.1e} nats over {len(gap)} tokens")


@pytest.fixture(scope="module")
def engine() -> Inside:
    """One engine for qwen3 policies, with room for their adapters."""
    return engine_of(policy_of(), rank=4)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True)])
def test_vllm_and_the_trainer_say_the_same_about_vllms_tokens(family: str, tied: bool) -> None:
    trainer = policy_of(family, tied=tied)
    policy = Sampler(trainer, engine_of(trainer))
    paths = policy.sample(PROMPTS, g=seeded())
    gap = gaps(policy, paths)
    report(f"{family}, float32, {'shared' if tied else 'own'} head", gap)
    assert len(paths) == len(PROMPTS)
    assert gap.max() < MOST
    assert any(p.truncated for p in paths)
    assert all(len(p) == 24 if p.truncated else int(p.steps[-1]) == 1 for p in paths)
    warmer = policy.sample(PROMPTS, g=seeded(), temperature=1.7)
    assert gaps(policy, warmer).max() > 0.1
    trainer.temperature = 1.7
    assert gaps(policy, warmer).max() < MOST  # log-probabilities are those after temperature


def test_bfloat16_is_further_off() -> None:
    trainer = policy_of(dtype=torch.bfloat16)
    policy = Sampler(trainer, engine_of(trainer, dtype="bfloat16"), dtype=torch.bfloat16)
    gap = gaps(policy, policy.sample(PROMPTS, g=seeded()))
    report("qwen3, bfloat16", gap)
    assert gap.max() < 1.0


def test_samples_follow_the_trainers_distribution(engine: Inside) -> None:
    policy = Sampler(policy_of(), engine)
    prompt = PROMPTS[3]
    draws = policy.sample([prompt] * 2000, g=seeded(), max_new=1)
    counts = torch.bincount(torch.tensor([int(p.steps[0]) for p in draws]), minlength=policy.config.vocab_size).double()
    with torch.no_grad():
        p = (policy.model(prompt[None]).logits[0, -1].double() / policy.temperature).softmax(-1)
    likely = p > 0.005
    z = (counts - 2000 * p)[likely] / (2000 * p * (1 - p))[likely].sqrt()
    assert likely.sum() > 3
    assert z.abs().max() < 4.5


def test_the_same_generator_gives_the_same_paths_and_greedy_is_the_trainers(engine: Inside) -> None:
    trainer = policy_of()
    policy = Sampler(trainer, engine)
    assert ids(policy.sample(PROMPTS, g=seeded(3))) == ids(policy.sample(PROMPTS, g=seeded(3)))
    greedy = policy.sample(PROMPTS, g=seeded(), temperature=0.0)
    assert ids(greedy) == ids(trainer.sample(PROMPTS, g=seeded(), temperature=0.0))


def test_a_stop_string_ends_a_path(engine: Inside) -> None:
    policy = Sampler(policy_of(), engine)
    paths = policy.sample(PROMPTS * 4, g=seeded(), stop=("a", "7"))
    stopped = [p for p in paths if not p.truncated and int(p.steps[-1]) not in policy.eos]
    assert stopped
    assert all(p.output.endswith(("a", "7")) and not any(c in p.output[:-1] for c in "a7") for p in stopped)
    assert gaps(policy, paths).max() < MOST


def test_new_weights_reach_vllm_and_nothing_of_the_old_ones_stays(engine: Inside) -> None:
    policy = Sampler(policy_of(seed=5), engine)
    before, old = policy.sample(PROMPTS, g=seeded()), snapshot(policy)
    stir(policy.model, 1)
    now = policy.sample(PROMPTS, g=seeded())  # the same prompts: cached keys and values would be those of the old weights
    assert gaps(policy, now).max() < MOST
    with swapped(policy, old):
        assert gaps(policy, before).max() < MOST
        assert gaps(policy, now).max() > 0.5
        assert ids(policy.sample(PROMPTS, g=seeded())) == ids(before)


def test_vllm_keeps_nothing_of_the_trainers_memory(engine: Inside) -> None:
    policy = Sampler(policy_of(seed=6), engine)
    before = policy.sample(PROMPTS, g=seeded())
    ask = Ask([p.tolist() for p in PROMPTS], list(range(len(PROMPTS))), 24, 0.8, [1])
    own = engine.sample(ask)
    stir(policy.model, 2)  # in place, as an optimizer does
    assert engine.sample(ask) == own
    assert ids(policy.sample(PROMPTS, g=seeded())) != ids(before)


def test_weights_that_changed_on_the_way_are_noticed(engine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Sampler(policy_of(seed=7), engine)
    load = engine.load
    changed = {"q_proj": 1 + 1e-6}
    monkeypatch.setattr(engine, "load", lambda some: load({k: w * changed.get(k.split(".")[-2], 1) for k, w in some.items()}))
    with pytest.raises(GruppoError, match=r"the engine's weights are not the trainer's: checksum \w{16} of"):
        policy.sample(PROMPTS, g=seeded())
    monkeypatch.undo()
    assert gaps(policy, policy.sample(PROMPTS, g=seeded())).max() < MOST


def test_a_head_that_keeps_its_old_packed_weight_is_noticed(engine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU vllm's own reload leaves a head that shares the embedding's weight as it was."""
    if torch.cuda.is_available():
        pytest.skip("weights are packed on CPU only")
    policy = Sampler(policy_of(seed=8), engine)

    def only_reload(worker: Any, weights: Any) -> Any:
        with torch.no_grad():
            worker.reload_weights(weights_iterator=iter(weights.items()))
            return inside.read_back(worker.get_model(), weights)

    monkeypatch.setattr(inside, "reload", only_reload)
    with pytest.raises(GruppoError, match=r"vllm's lm_head\.weight does not hold the numbers it was handed in"):
        policy.sample(PROMPTS, g=seeded())
    monkeypatch.undo()
    assert gaps(policy, policy.sample(PROMPTS, g=seeded())).max() < MOST


def test_weights_that_are_missing_are_noticed(engine: Inside) -> None:
    weights = weights_of(policy_of(seed=8).model)
    print("read back:", engine.load(weights))
    del weights["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(GruppoError, match=r"qkv_proj\.weight that is not among the \d+ handed over"):
        engine.load(weights)
    with pytest.raises(GruppoError, match="the engine has no weights yet"):
        engine.sample(Ask([[5]], [0], 2, 1.0, [1]))


def test_an_adapter_is_handed_over_without_merging(engine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Sampler(policy_of(lora=True), engine)
    loads: list[int] = []
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda weights: loads.append(len(weights)) or load(weights))
    seen = []
    for n in range(3):
        paths = policy.sample(PROMPTS, g=seeded())
        gap = gaps(policy, paths)
        report(f"qwen3, float32, adapter {n + 1}", gap)
        assert gap.max() < MOST
        with policy.model.disable_adapter():
            assert gaps(policy, paths).max() > 0.1
        seen.append(ids(paths))
        stir(policy.model, n, "lora_")
    assert seen[0] != seen[1] != seen[2]
    assert len(loads) == 1
    assert len(engine.llm.list_loras()) == 1
    plain = Sampler(policy_of(), engine)  # without the adapter the engine samples the plain model again
    assert gaps(plain, plain.sample(PROMPTS, g=seeded())).max() < MOST


def test_an_adapter_may_be_merged_instead() -> None:
    trainer = policy_of(lora=True)
    policy = Sampler(trainer, engine_of(trainer), merge=True)
    assert gaps(policy, policy.sample(PROMPTS, g=seeded())).max() < MOST


def test_a_time_out_is_a_sentence_and_vllm_lives_on(engine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Sampler(policy_of(), engine)
    policy.hand_over()
    monkeypatch.setattr(engine, "timeout", 1e-4)
    with pytest.raises(GruppoError, match=r"vllm sampled \d+ of 24 completions within 0\.0001 s \(policy\.engine\.timeout\)"):
        policy.sample(PROMPTS, g=seeded())
    monkeypatch.undo()
    assert gaps(policy, policy.sample(PROMPTS, g=seeded())).max() < MOST


def test_the_trainer_keeps_its_threads_and_random_numbers() -> None:
    trainer = policy_of()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    engine_of(trainer)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def given(folder: Path, **engine: Any) -> dict[str, Any]:
    """A run's files and numbers, its model of a size that vllm has kernels for."""
    out = files(folder)
    tiny_model("qwen3", **SIZES["qwen3"]).save_pretrained(folder / "model")
    return merge(out, {"policy": {"engine": {"timeout": 120, **engine}}, "fit": {"learning_rate": 1e-2}})


def trained(config: dict[str, Any]) -> Session:
    session = Session.new(assemble(config), say=silent)
    before, quiet = snapshot(session.policy), Quiet()
    session.run(quiet)
    print("gap by step:", [f"{r['gap']:.1e}" for r in quiet.records])
    assert [r["step"] for r in quiet.records] == list(range(1, session.config.ends[-1] + 1))
    assert all(0 < r["gap"] < MOST and abs(r["sampler_weight"] - 1) < MOST for r in quiet.records)
    assert any(not torch.equal(a, b) for a, b in zip(before, snapshot(session.policy)))
    return session


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}])
def test_a_grpo_run_with_vllm_inside(tmp_path: Path, lora: Any) -> None:
    trained(merge(given(tmp_path, memory=MEMORY), {"policy": {"lora": lora}}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    given(folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "gruppo.policies.engines.vllm", str(folder / "model"), "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*words, "--memory", str(MEMORY), "--timeout", "120"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    Remote(f"http://127.0.0.1:{port}", timeout=5.0)
                except GruppoError:
                    time.sleep(1)
                else:
                    break
            else:
                pytest.fail((folder / "log").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}", folder
        finally:
            process.terminate()
            process.wait(30)


def test_a_grpo_run_with_a_vllm_server(server: tuple[str, Path]) -> None:
    url, folder = server
    session = trained(given(folder, url=url))
    assert Remote(url).state()["weights"] == session.policy.handed["weights"]
