"""An engine in another program, on this machine or another one: `Remote` is the trainer's end, `serve` the engine's.

    GET  /state                 {"weights": checksum or null, "adapter": checksum or null}
    POST /sample    JSON        the fields of `Ask`; answers {"draws": [{"ids": [...], "logp": [...], "ended": true}, ...]}
    POST /weights   safetensors one part of the weights; its metadata say which part of how many; the last one loads them all
    POST /adapter   safetensors an adapter's tensors; its metadata hold peft's numbers

Errors come back as {"error": sentence}. Weights go from memory to memory; nothing that arrives is ever run or unpickled.
"""

from __future__ import annotations

import json
import math
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from gruppo.policies.engines import Ask, Draw, Engine, Receipt
from gruppo.types import GruppoError

LOCAL = ("localhost", "127.0.0.1", "::1")
PART = 2**29  # bytes of weights that travel together
MOST = 2**33  # bytes of one request that a server reads


class Remote:
    """The engine behind a URL. Every answer is waited for `timeout` seconds, then a sentence says what did not come."""

    def __init__(self, url: str, *, timeout: float = 600.0, part: int = PART) -> None:
        at = urllib.parse.urlsplit(url)
        if at.scheme not in ("http", "https") or not at.hostname:
            raise GruppoError(f"policy.engine.url is {url!r}; an address like http://127.0.0.1:8801 belongs there")
        self.url, self.timeout, self.part = url.rstrip("/"), timeout, part
        proxies = (urllib.request.ProxyHandler({}),) if at.hostname in LOCAL else ()  # a proxy cannot reach this machine's ports
        self.opener = urllib.request.build_opener(*proxies)
        self.state()

    def state(self) -> dict[str, Any]:
        """Checksums of what the engine holds."""
        return self._ask("state", None)

    def sample(self, ask: Ask) -> list[Draw]:
        """Completions in the order of their prompts."""
        said = self._ask("sample", json.dumps(asdict(ask)).encode())
        try:
            return [Draw([int(t) for t in d["ids"]], [number(x) for x in d["logp"]], bool(d["ended"])) for d in said["draws"]]
        except (KeyError, TypeError, ValueError) as error:
            raise GruppoError(f"{self.url}/sample answered something else than completions ({error!r})") from error

    def load(self, weights: Mapping[str, Tensor]) -> Receipt:
        """Send the weights, in parts."""
        parts = list(cut(weights, self.part))
        said: Any = None
        for n, names in enumerate(parts):
            body = save(still(weights, names), {"part": str(n), "of": str(len(parts))})
            said = self._ask("weights", body)
        return receipt(said, self.url)

    def adapt(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Receipt:
        """Send an adapter."""
        return receipt(self._ask("adapter", save(still(tensors, list(tensors)), {"config": json.dumps(dict(config))})), self.url)

    def close(self) -> None:
        """Nothing is held here."""

    def _ask(self, what: str, body: bytes | None) -> Any:
        url = f"{self.url}/{what}"
        try:
            with self.opener.open(urllib.request.Request(url, body), timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read(4000).decode(errors="replace")
            error.close()
            try:
                said = json.loads(text)["error"]
            except (ValueError, KeyError, TypeError):
                said = text.strip().splitlines()[0][:300] if text.strip() else "nothing"
            raise GruppoError(f"{url} answered {error.code}: {said}") from error
        except (TimeoutError, urllib.error.URLError) as error:
            if isinstance(error, TimeoutError) or isinstance(error.reason, TimeoutError):
                raise GruppoError(
                    f"{url} did not answer within {self.timeout:g} s (policy.engine.timeout); the engine may be stuck, or slow"
                ) from error
            raise GruppoError(f"no engine answers at {url}: {error.reason}; start one, or correct policy.engine.url") from error
        except (OSError, ValueError) as error:
            raise GruppoError(f"{url} broke off or sent no JSON ({type(error).__name__})") from error


def number(x: Any) -> float:
    """JSON has no -infinity: null stands for a log-probability that is not finite."""
    return float("-inf") if x is None else float(x)


def receipt(said: Any, url: str) -> Receipt:
    """The engine's account of what arrived."""
    try:
        return Receipt(**said)
    except TypeError as error:
        raise GruppoError(f"{url} took the weights but did not say which arrived ({error})") from error


def cut(weights: Mapping[str, Tensor], size: int) -> Iterator[list[str]]:
    """Names in their order, in parts of at most `size` bytes or one tensor."""
    some: list[str] = []
    count = 0
    for name, w in weights.items():
        own = w.numel() * w.element_size()
        if some and count + own > size:
            yield some
            some, count = [], 0
        some.append(name)
        count += own
    if some:
        yield some


def still(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Copies that safetensors can write: on the CPU, laid out in order, sharing nothing."""
    return {name: weights[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in names}


class Desk:
    """The engine's end: one request at a time, parts of weights put together."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lock = engine, threading.Lock()
        self.parts: dict[str, Tensor] = {}
        self.next = 0
        self.held: dict[str, str | None] = {"weights": None, "adapter": None}

    def sample(self, body: bytes) -> Any:
        said = json.loads(body)
        ask = Ask(**{**said, "stop": tuple(said["stop"])})
        now = {kind: sum_ for kind, sum_ in self.held.items() if sum_ is not None}
        if now != ask.held:
            raise GruppoError(
                f"completions of the weights {told(ask.held)} are asked for, but the engine now holds {told(now)}: it was "
                "started again, or another trainer uses it; every run needs an engine of its own. Resume the run"
            )
        draws = self.engine.sample(ask)
        return {
            "draws": [{"ids": d.ids, "logp": [x if math.isfinite(x) else None for x in d.logp], "ended": d.ended} for d in draws]
        }

    def weights(self, body: bytes) -> Any:
        tensors, told = opened(body)
        n, of = int(told["part"]), int(told["of"])
        if n == 0:
            self.parts, self.next = {}, 0
        if n != self.next:
            self.parts, self.next = {}, 0
            raise GruppoError(
                f"part {n} of {of} of the weights came where part {self.next} was due; send them again from the start"
            )
        self.parts |= tensors
        self.next += 1
        if self.next < of:
            return {"part": n}
        weights, self.parts, self.next = self.parts, {}, 0
        self.held = {"weights": None, "adapter": None}
        got = self.engine.load(weights)
        self.held["weights"] = got.checksum
        return asdict(got)

    def adapter(self, body: bytes) -> Any:
        tensors, told = opened(body)
        self.held["adapter"] = None
        got = self.engine.adapt(tensors, json.loads(told["config"]))
        self.held["adapter"] = got.checksum
        return asdict(got)


def told(held: Mapping[str, str]) -> str:
    """Checksums as a person reads them."""
    return " + ".join(held[kind] for kind in ("weights", "adapter") if kind in held) or "none"


def opened(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file in memory."""
    length = int.from_bytes(body[:8], "little")
    return load(body), json.loads(body[8 : 8 + length]).get("__metadata__", {})


def serve(engine: Engine, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server around an engine, not yet running: `serve_forever` runs it. Port 0 takes a free one."""
    desk = Desk(engine)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, desk.held) if self.path == "/state" else self.answer(404, {"error": f"there is no {self.path}"})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            what = {"/sample": desk.sample, "/weights": desk.weights, "/adapter": desk.adapter}.get(self.path)
            if what is None or length > MOST:
                self.close_connection = True
                self.answer(404 if what is None else 413, {"error": f"there is no {self.path}" if what is None else "too long"})
                return
            body = self.rfile.read(length)
            try:
                with desk.lock:
                    said = what(body)
            except GruppoError as error:
                self.answer(500, {"error": str(error)})
            except Exception as error:
                self.answer(400, {"error": f"{type(error).__name__}: {error}"})
            else:
                self.answer(200, said)

        def answer(self, code: int, said: Any) -> None:
            body = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)
