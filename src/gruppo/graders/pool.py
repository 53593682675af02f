"""A pool of worker programs that can be killed one by one: the only honest time limit for code that never comes back.

Threads cannot be killed, `signal.alarm` works in the main thread only, and `multiprocessing` runs the person's script again in
every child. So a worker is an interpreter of its own that reads a request per line and answers with a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gruppo.types import GruppoError

START = 120.0  # seconds a worker may take to say that it is ready; imports on a cold, busy disk


@dataclass(frozen=True)
class Failed:
    """A request that got no answer, and why."""

    reason: str


class Worker:
    """One running program, its reader thread and what it is working on."""

    def __init__(self, command: Sequence[str], heard: queue.SimpleQueue) -> None:
        # its own session: Ctrl-C at the terminal is for the run, and a worker killed by it would look like a crash
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.ready, self.job = False, None
        self.deadline = time.monotonic() + START
        self.thread = threading.Thread(target=self._listen, args=(heard,), daemon=True, name="gruppo-pool")
        self.thread.start()

    def _listen(self, heard: queue.SimpleQueue) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                heard.put((self, line))
        heard.put((self, None))

    def send(self, job: int, request: Any, timeout: float) -> bool:
        """Hand over a request; False when the worker is dead."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        self.job, self.deadline = job, time.monotonic() + timeout
        return True

    def end(self) -> int:
        """Kill it, reap it, close its pipes; the exit status."""
        self.process.kill()
        status = self.process.wait()
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        if self.thread is not threading.current_thread():  # the garbage collector runs in any thread
            self.thread.join(5)
        return status


class Pool:
    """Workers of one program, started when first needed, reused, replaced when killed, ended with the interpreter."""

    def __init__(self, program: str, arguments: Sequence[str] = ()) -> None:
        # -P: the program's folder must not shadow the standard library (it holds a math.py)
        self.command = [sys.executable, "-P", program, *arguments]
        self.workers: list[Worker] = []
        self.heard: queue.SimpleQueue = queue.SimpleQueue()
        self.owner, self.lock = [os.getpid()], threading.Lock()
        weakref.finalize(self, end_all, self.workers, self.owner)  # when the pool is dropped, and at exit

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, (self.command[2], tuple(self.command[3:]))

    def map(self, requests: Sequence[Any], *, workers: int, timeout: float) -> list[Any]:
        """The answer to every request, in order; `Failed` where a worker crashed or took longer than `timeout` seconds."""
        if self.owner[0] != os.getpid():  # after a fork the workers are the parent's, and so may the lock be
            self.workers.clear()
            self.heard, self.lock, self.owner[0] = queue.SimpleQueue(), threading.Lock(), os.getpid()
        with self.lock:
            try:
                return self._map(requests, workers, timeout)
            except BaseException:  # Ctrl-C in the middle: half-answered workers would answer the next call's questions
                end_all(self.workers, self.owner)
                raise

    def _map(self, requests: Sequence[Any], workers: int, timeout: float) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        waiting = deque(range(len(requests)))
        left = len(requests)
        while left:
            while len(self.workers) < min(workers, left):
                self.workers.append(Worker(self.command, self.heard))
            for worker in [w for w in self.workers if w.ready and w.job is None]:
                if waiting and not worker.send(waiting[0], requests[waiting[0]], timeout):
                    self._drop(worker)  # it died while idle; nobody's answer is lost
                elif waiting:
                    waiting.popleft()
            busy = [w for w in self.workers if w.job is not None or not w.ready]
            if not busy:
                continue
            try:
                worker, line = self.heard.get(timeout=max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            except queue.Empty:
                for worker in [w for w in busy if w.deadline <= time.monotonic()]:
                    self._drop(worker)
                    if not worker.ready:
                        raise GruppoError(
                            f"a grading worker was not ready after {START:.0f} seconds: {' '.join(self.command)}"
                        ) from None
                    answers[worker.job] = Failed(f"time-out after {timeout:g} s")  # type: ignore[index]
                    left -= 1
                continue
            if worker not in self.workers:
                continue  # the last words of one that was killed
            if line is None:
                status = self._drop(worker)
                if not worker.ready:
                    raise GruppoError(
                        f"a grading worker ended with status {status} before it was ready: {' '.join(self.command)}"
                    )
                if worker.job is not None:
                    answers[worker.job] = Failed(f"worker crashed (status {status})")
                    left -= 1
                continue
            message = json.loads(line)
            if not worker.ready:
                if "broken" in message:
                    raise GruppoError(f"a grading worker cannot start: {message['broken']}")
                worker.ready = True
            elif worker.job is not None:
                answers[worker.job], worker.job = message, None
                left -= 1
        return answers

    def _drop(self, worker: Worker) -> int:
        self.workers.remove(worker)
        return worker.end()

    def close(self) -> None:
        """End every worker; the next call starts new ones."""
        with self.lock:
            end_all(self.workers, self.owner)


def end_all(workers: list[Worker], owner: list[int]) -> None:
    """Kill these workers, unless they are another process's."""
    while workers and owner[0] == os.getpid():
        workers.pop().end()
