"""The examples do what their first lines say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    return load("grpo_in_one_file")


def test_the_reading_door_raises_its_reward(one_file, capsys):
    """Twenty of its eighty steps: from chance, about 0.08, to more than 0.3."""
    history = one_file.train(steps=20)
    assert sum(history[:3]) / 3 < 0.2
    assert sum(history[-3:]) / 3 > 0.3
    assert "reward" in capsys.readouterr().out


def test_the_reading_door_needs_nothing_of_the_library():
    """It can be copied out of the repository and run."""
    source = (EXAMPLES / "grpo_in_one_file.py").read_text()
    assert "import gruppo" not in source
    assert "from gruppo" not in source
    assert len(source.splitlines()) < 170


def test_its_equal_rewards_give_no_gradient(one_file):
    rewards = torch.tensor([[0.7] * 4, [0.0, 1.0, 0.0, 0.0]])
    A = one_file.advantages(rewards)
    assert A[0].abs().max() < 1e-3
    torch.testing.assert_close(A[1], torch.tensor([-0.4999, 1.4997, -0.4999, -0.4999]), atol=1e-4, rtol=0)


def test_its_loss_is_the_recipes_loss(one_file):
    """The one-file loss against the library's GRPO on ragged rows, off-policy, with KL."""
    from gruppo.core.collate import collate
    from gruppo.core.reduce import weigh
    from gruppo.recipes import recipe
    from gruppo.types import Group, Path, Steps, Task

    g = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4, 2]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    now, old, ref = (torch.randn(4, 4, generator=g) * 0.3 - 1 for _ in range(3))
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    mine = one_file.grpo_loss(now, old, ref, one_file.advantages(rewards.view(1, 4)).view(-1, 1), mask, beta=0.3)
    method = recipe("grpo", n=4, beta=0.3)
    paths = [Path(torch.zeros(1), torch.zeros(n), old[i, :n], torch.ones(n, dtype=torch.bool)) for i, n in enumerate(lengths)]
    group = Group(Task("x"), paths, reward=rewards)
    batch = weigh(collate([group.with_(advantage=method.advantage(group))]), method.reduce)
    loss, _ = method.loss(batch, Steps(now), Steps(ref))
    assert float((batch.weight * loss).sum()) == pytest.approx(float(mine), rel=1e-5)


def test_it_samples_and_reads_one_distribution(one_file, monkeypatch):
    """At a temperature other than 1 the frequency of the first token is what `log_probs` says."""
    monkeypatch.setattr(one_file, "TEMPERATURE", 0.5)
    torch.manual_seed(0)
    model = one_file.tiny_model()
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    prompts = torch.tensor([[7, 3, one_file.EQUALS]]).expand(4000, -1)
    completions, _ = one_file.sample(model, prompts, torch.Generator().manual_seed(1))
    with torch.no_grad():
        every = torch.arange(13)[:, None].expand(-1, one_file.MAX_NEW)
        p = one_file.log_probs(model, prompts[:13], every)[:, 0].exp()
    seen = torch.bincount(completions[:, 0], minlength=13) / 4000
    assert (seen - p).abs().max() < 0.03
    assert p.max() > 0.15


def test_the_end_token_is_trained(one_file):
    torch.manual_seed(0)
    model = one_file.tiny_model()
    prompts = one_file.some_prompts(200, torch.Generator().manual_seed(0))
    completions, mask = one_file.sample(model, prompts, torch.Generator().manual_seed(1))
    ended = (completions == one_file.EOS).any(1)
    assert 0.1 < ended.float().mean() < 0.9
    is_end = (completions == one_file.EOS).long()
    assert torch.equal(mask, is_end.cumsum(1) - is_end == 0)  # every token up to the first end token, and that one


@pytest.mark.slow
def test_the_script_runs_from_the_command_line():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "grpo_in_one_file.py"), "--steps", "3", "--beta", "0.01"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "step   1" in done.stdout


def test_a_trl_script_runs_here_with_its_functions_and_data_untouched(tmp_path):
    """Two steps: both functions are signals, and what the async one has nothing to say about does not fail."""
    script = load("trl_users")
    run = script.with_gruppo(script.sums(60), 2, str(tmp_path))
    assert len(run.metrics) == 2
    assert {"correct", "shows_work"} <= run.metrics[0]["signals"].keys()
    assert 0 <= run.metrics[0]["signals"]["correct"] <= 1
    assert run.before is not None
    assert run.after is not None


@pytest.mark.slow
def test_the_trl_script_learns(tmp_path):
    script = load("trl_users")
    metrics = script.with_gruppo(script.sums(2000), 40, str(tmp_path)).metrics
    first, last = (sum(m["signals"]["correct"] for m in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert last > first + 0.25


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_script_runs_with_trl(tmp_path):
    pytest.importorskip("trl")
    script = load("trl_users")
    script.with_trl(script.sums(60), 1, str(tmp_path))


def test_pictures_are_trained_on_a_reward_of_ones_own(tmp_path):
    images = load("images")
    run = images.main(
        fit={"steps": 1, "prompts_per_step": 2, "paths_per_prompt": 3},
        policy={"denoising_steps": 4, "threads": 1},
        eval={"tasks": 2, "samples": 2},
        folder=tmp_path,
        quiet=True,
    )
    signals = run.metrics[0]["signals"]
    assert 0 < signals["emptiness"] < 1
    assert run.metrics[0]["reward"] == pytest.approx(signals["correct"] + signals["emptiness"], abs=1e-5)
