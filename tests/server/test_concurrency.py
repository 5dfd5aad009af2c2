"""Many callers at once: everybody is answered, text never waits for images, and images are batched and remembered."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from client import Client
from client.server import Server
from python_backends import contract


def statistics(server: Server, model: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.addresses.http}/v2/models/{model}/stats") as response:
        found: dict[str, Any] = json.load(response)["model_stats"][0]
    return found


def looked_up(server: Server, before: dict[str, Any]) -> tuple[int, int]:
    """(hits, misses) of the response cache since ``before``."""
    after = statistics(server, contract.VISION_ENCODER)["inference_stats"]
    known = before["inference_stats"]
    hits, misses = (
        int(after[name].get("count", 0)) - int(known[name].get("count", 0)) for name in ("cache_hit", "cache_miss")
    )
    return hits, misses


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40, 40), (number % 256, 80, 160))


def test_short_requests_by_the_hundred_leave_the_server_whole(server: Server, client: Client) -> None:
    """A response that crossed the end of its request once ended tritonserver after a few dozen of these."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: client.generate(f"Hello {number}", max_tokens=2), range(400)))
    assert all(answer.usage.completion_tokens in {1, 2} for answer in answers)
    server.check()


def test_text_never_reaches_the_vision_encoder_and_images_are_batched_and_cached(
    server: Server, client: Client
) -> None:
    before = statistics(server, contract.VISION_ENCODER)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: client.generate(f"Hi {number}", max_tokens=1), range(40)))
    assert statistics(server, contract.VISION_ENCODER) == before
    asked = [number % 12 for number in range(48)]
    with ThreadPoolExecutor(16) as pool:
        # A salt for each: a picture whose KV is held would not come to the encoder at all.
        images = pool.map(
            lambda item: client.generate("What?", images=[picture(item[1])], max_tokens=1, cache_salt=str(item[0])),
            enumerate(asked),
        )
        texts = pool.map(lambda number: client.generate(f"Hi {number}", max_tokens=1), range(48))
        assert len([*images, *texts]) == 96
    # Triton counts a request a moment after it was answered, and of equal images at once not always each.
    deadline = time.monotonic() + 10
    while (counted := looked_up(server, before))[0] + counted[1] < 36 and time.monotonic() < deadline:
        time.sleep(0.1)
    hits, misses = counted
    assert misses >= 12, "every picture was encoded"
    assert hits > 0, "none of them every time"
    assert 36 <= hits + misses <= 48, "and text not once"


@pytest.mark.parametrize("count", [3])
def test_several_answers_come_in_one_stream(client: Client, count: int) -> None:
    pieces = list(client.stream("Hello", n=count, temperature=1.0, seed=4, max_tokens=6))
    finished = [piece.index for piece in pieces if piece.finish_reason]
    assert sorted(finished) == list(range(count))
