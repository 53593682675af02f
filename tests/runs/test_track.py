import builtins
import importlib
import sys
import types
from pathlib import Path

import pytest

from gruppo.runs import track
from gruppo.types import GruppoError


def recorder(calls: list) -> types.ModuleType:
    module = types.ModuleType("recorder")
    module.init = lambda **k: calls.append(("init", k))
    module.log = lambda values, step: calls.append(("log", step, values))
    module.finish = lambda: calls.append(("finish",))
    return module


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_numbers_go_out_flat_and_finite(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []
    monkeypatch.setitem(sys.modules, name, recorder(calls))
    to = track.tracker(name, tmp_path / "run")
    to.start({"recipe": "2402.03300"})
    to.log(3, {"step": 3, "time": 1.0, "reward": 0.5, "kl": float("nan"), "length_wrong": None, "signals": {"correct": 0.25}})
    to.finish()
    assert calls[0][1]["config"] == {"recipe": "2402.03300"}
    assert calls[1:] == [("log", 3, {"reward": 0.5, "signals/correct": 0.25}), ("finish",)]


def test_a_resumed_run_keeps_its_identity_and_a_new_one_does_not_share_it(tmp_path: Path) -> None:
    first = track.identity(tmp_path / "a")
    assert track.identity(tmp_path / "a") == first
    (tmp_path / "a" / "track.json").unlink()
    assert track.identity(tmp_path / "a") != first


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_missing_package_is_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(GruppoError, match=rf"needs the package {name}.*pip install 'gruppo\[{name}\]'"):
        track.tracker(name, tmp_path)


def test_a_package_that_is_broken_inside_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str):
        raise ModuleNotFoundError("No module named 'its_dependency'", name="its_dependency")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="its_dependency"):
        track.tracker("wandb", tmp_path)


def test_tensorboard_gets_one_scalar_per_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            written.append(log_dir)

        def add_text(self, *a) -> None: ...
        def add_scalar(self, *a) -> None:
            written.append(a)

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    to = track.tracker("tensorboard", tmp_path)
    to.start({})
    to.log(7, {"reward": 1.0, "signals": {"format": 0.5}})
    to.finish()
    assert written == [str(tmp_path / "tensorboard"), ("reward", 1.0, 7), ("signals/format", 0.5, 7), "closed"]


def test_an_unknown_tracker_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match="there is no tracker 'mlflow'; there are: trackio, wandb, tensorboard"):
        track.tracker("mlflow", tmp_path)


def test_nothing_is_imported_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (seen.append(name), real(name, *a, **k))[1])
    importlib.reload(track)
    assert not {"wandb", "trackio", "tensorboard"} & {n.split(".")[0] for n in seen}
