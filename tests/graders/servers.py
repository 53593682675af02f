"""Servers on loopback for the graders that ask over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Asked:
    """What the server was asked, and how many questions stood open at the same time."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.open, self.most, self.lock = 0, 0, threading.Lock()
        self.company = threading.Event()  # two questions have stood open at once


Respond = Callable[[Any, int], tuple[int, Any]]  # (body, how many came before) -> (status, JSON or bytes)


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def answering(respond: Respond, delay: float = 0.0, *, company: bool = False) -> Iterator[tuple[str, Asked]]:
    """A server that answers as told: (its address, what it was asked).

    With `company` the first answer waits for a second question: on a busy machine two askers may start a second apart.
    """
    seen = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                before = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
                seen.open += 1
                seen.most = max(seen.most, seen.open)
                if seen.most > 1:
                    seen.company.set()
            if company:
                seen.company.wait(4)  # within the askers' patience
            time.sleep(delay)
            status, said = respond(body, before)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            with seen.lock:
                seen.open -= 1
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the asker's patience ended
                pass

        def log_message(self, *_: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, seen
