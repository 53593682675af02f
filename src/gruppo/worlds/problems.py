"""The seeded streams of a world: endless training tasks, and held-out ones that none of them ever meets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random

from gruppo.types import GruppoError, Task

TRIES = 2000  # draws in search of one task; where a tenth is held out, 2000 in a row all miss it once in 10^93 times


class Problems:
    """What worlds of text and of pictures have in common: problems drawn from a seed, on one side or the other."""

    name: str
    problem: Callable[[Random], Task]
    key: Callable[[Task], str]  # equal for problems that are the same question; decides train or held-out

    def task(self, seed: int, index: int) -> Task:
        """The index-th training task of this seed; never a held-out problem."""
        return self._draw(Random(f"{self.name} {seed} {index}"), held_out=False)

    def held_out(self, n: int) -> list[Task]:
        """The first n held-out tasks, all different; no training stream contains any of them."""
        found: dict[str, Task] = {}
        random = Random(f"{self.name} held-out")
        for _ in range(1000 * n + 1000):
            if len(found) == n:
                return list(found.values())
            task = self._draw(random, held_out=True)
            found.setdefault(self.key(task), task)
        raise GruppoError(f"the world {self.name} has only {len(found)} different held-out problems, {n} were asked for")

    def _draw(self, random: Random, *, held_out: bool) -> Task:
        seen: set[str] = set()
        for _ in range(TRIES):
            task = self.problem(random)
            key = self.key(task)
            if is_held_out(key) == held_out:
                return task
            seen.add(key)
        raise GruppoError(
            f"{TRIES} problems of the world {self.name} were drawn, {len(seen)} of them different, and "
            f"{'none is' if held_out else 'all are'} held out, so there is nothing to {'evaluate' if held_out else 'train'} on; "
            "a tenth is held out by the hash of `key`, which needs more kinds of problems"
        )


def is_held_out(key: str) -> bool:
    """One problem in ten, decided by a hash of the problem itself, so that train and held-out cannot meet."""
    return hashlib.sha256(key.encode()).digest()[0] * 10 < 256
