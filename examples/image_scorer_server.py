"""A server that scores pictures for gruppo, in the standard library: put your own model into `score`.

    python examples/image_scorer_server.py --port 8000

    from gruppo.graders.http import HttpScorer
    from gruppo.graders.images import ImageScore
    grader = ImageScore(HttpScorer("http://127.0.0.1:8000/score"), "warmth")

What comes in and what goes out:

    POST /score    {"images": ["<base64>", ...], "mime": "image/png", "prompts": ["...", ...]}
    200            {"scores": [0.31, null, ...]}     one per picture; null where a picture cannot be graded
    4xx            the question is wrong: gruppo does not ask again, and the pictures abstain with what you say here
    5xx            something broke: gruppo asks again, waiting longer each time
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat


def score(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Warmth: the mean of red minus the mean of blue, from -1 to 1. Yours: HPSv3, ImageReward, OCR, a judge ...

    Here one model, loaded once and asked by one thread at a time, would be the usual thing.
    """
    found: list[float | None] = []
    for image in images:
        if min(image.size) < 2:
            found.append(None)  # nothing to say about a picture of one pixel
            continue
        red, _, blue = ImageStat.Stat(image).mean
        found.append((red - blue) / 255)
    return found


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in asked["images"]]
            prompts = asked["prompts"]
        except (KeyError, TypeError, ValueError, OSError) as error:
            return self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        if len(prompts) != len(images):
            return self.answer(400, {"error": f"{len(images)} images came with {len(prompts)} prompts"})
        return self.answer(200, {"scores": score(images, prompts)})

    def answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet: a run asks thousands of times."""


def serve(host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """The server, not yet running; port 0 takes a free one (`server_port` says which)."""
    return ThreadingHTTPServer((host, port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with serve(given.host, given.port) as server:
        print(f"scoring at http://{given.host}:{server.server_port}/score", flush=True)
        server.serve_forever()
