"""Scorers that live in another program: pictures go out as JSON, one number per picture comes back.

    POST url    {"images": ["<base64>", ...], "mime": "image/png", "prompts": ["...", ...]}
    200         {"scores": [0.31, null, ...]}        or the list alone; null = this picture was not graded

So heavy scorers (HPSv2, HPSv3, ImageReward, OCR, a judge of one's own) keep their own environment and their own device.
`examples/image_scorer_server.py` is a server of this protocol in the standard library.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gruppo.graders.grade import Abstained
from gruppo.graders.images import Score, jpeg
from gruppo.types import GruppoError

Encode = Callable[[Any], tuple[str, bytes]]  # a picture -> (mime type, file)
AGAIN = (408, 425, 429)  # besides every 5xx: the server may answer the same question later
LOCAL = ("localhost", "127.0.0.1", "::1")


class Unanswered(Exception):
    """No usable answer came, however often it was asked. Says why."""


def png(image: Any) -> tuple[str, bytes]:
    """Without loss."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return "image/png", file.getvalue()


@dataclass(frozen=True)
class Jpeg:
    """With loss, a tenth of the size."""

    quality: int = 95

    def __call__(self, image: Any) -> tuple[str, bytes]:
        return "image/jpeg", jpeg(image, self.quality)


@dataclass(frozen=True)
class Patience:
    """How long one answer may take and how often it is asked for: waits of backoff, 2 backoff, 4 backoff, ... in between."""

    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and self.retries >= 0 and self.backoff >= 0):
            raise GruppoError(
                f"timeout is {self.timeout}, retries {self.retries}, backoff {self.backoff}; a time-out above 0 and no negative "
                "number belong there"
            )


PATIENT = Patience()


def post(url: str, body: Any, patience: Patience, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that the server answers to this JSON; `Unanswered` with the last reason when it never does."""
    scheme, host = urllib.parse.urlsplit(url).scheme, urllib.parse.urlsplit(url).hostname
    if scheme not in ("http", "https") or not host:
        raise GruppoError(f"{url!r} is no address of a server; one like http://127.0.0.1:8000/score belongs there")
    proxies = (urllib.request.ProxyHandler({}),) if host in LOCAL else ()  # a proxy cannot reach this machine's own ports
    opener = urllib.request.build_opener(*proxies)
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}, method="POST"
    )
    reason = ""
    for attempt in range(patience.retries + 1):
        if attempt:
            time.sleep(patience.backoff * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=patience.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace").strip().splitlines()
            error.close()
            reason = f"{url} answered {error.code}" + (f": {said[0]}" if said else "")
            if error.code < 500 and error.code not in AGAIN:
                raise Unanswered(reason) from error  # the same question would be refused again
        except TimeoutError:
            reason = f"{url} did not answer within {patience.timeout:g} s"
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            reason = f"{url} did not answer within {patience.timeout:g} s" if late else f"{url}: {error.reason}"
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = f"{url} broke off or sent no JSON ({type(error).__name__})"
    raise Unanswered(reason + (f", asked {patience.retries + 1} times" if patience.retries else ""))


@dataclass(frozen=True)
class HttpScorer:
    """A scorer behind a URL. Requests of `batch` pictures, `workers` of them at the same time.

    A request that gets no answer makes its pictures abstain, with the reason; the others keep their numbers. Put it into
    `ImageScore(HttpScorer(url), "hpsv3", batch=256)`: the grader's batch is what is in flight together.
    """

    url: str
    batch: int = 8
    workers: int = 8
    patience: Patience = PATIENT
    encode: Encode = png
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        parts = [slice(i, i + self.batch) for i in range(0, len(images), self.batch)]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(lambda part: self.ask(images[part], prompts[part]), parts))
        return [value for values in found for value in values]

    def ask(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        """One request."""
        files = [self.encode(image) for image in images]
        body = {
            "images": [base64.b64encode(data).decode() for _, data in files],
            "mime": files[0][0],
            "prompts": [p if isinstance(p, str) else json.dumps(p) for p in prompts],
        }
        try:
            answer = post(self.url, body, self.patience, self.headers)
        except Unanswered as error:
            return [Abstained(str(error), error)] * len(images)
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list) or len(scores) != len(images):
            found = f"{len(scores)} scores" if isinstance(scores, list) else f"no list of scores but {str(answer)[:80]!r}"
            wrong = ValueError(f"{self.url} sent {found} for {len(images)} pictures")
            return [Abstained(str(wrong), wrong)] * len(images)
        return [self.number(value) for value in scores]

    def number(self, value: Any) -> Score:
        """One entry of the answer."""
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value if value is None else float(value)
        wrong = ValueError(f"{self.url} sent {str(value)[:40]!r} where a number or null belongs")
        return Abstained(str(wrong), wrong)
