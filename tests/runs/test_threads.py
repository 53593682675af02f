from __future__ import annotations

import pytest
import torch

from gruppo.runs import threads


def test_one_core_needs_no_measurement() -> None:
    assert threads.choose(available=1) == threads.Choice(1, {1: 0.0})


def pretended(monkeypatch: pytest.MonkeyPatch, one: float, two: float) -> None:
    """A clock that only the work moves, so that a busy machine changes nothing."""
    now = [0.0]

    def work(*_: torch.Tensor) -> None:
        now[0] += one if torch.get_num_threads() == 1 else two

    monkeypatch.setattr(threads, "_work", work)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])


def test_the_fastest_number_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, 0.004, 0.001)
    assert threads.choose(available=2, seconds=0.1).threads == 2


def test_a_slight_gain_is_not_worth_a_second_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, 0.0200, 0.0195)
    assert threads.choose(available=2, seconds=0.1).threads == 1


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    threads.choose(available=2, seconds=0.05)
    assert torch.get_num_threads() == before


def test_the_environment_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.cores() == 1
