"""Malformed, oversized, slow and vanishing clients get their status, and one who behaves notices nothing."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from client.server.gateway import Gateway
from tests.client.gateway.test_images import bomb
from tests.server.gateway.conftest import StartGateway

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5000, "ignore_eos": True}
# Nothing repeats itself, so that no draft is right, and there is much of it.
SLOW: dict[str, Any] = {**LONG, "stream": True, "n": 16, "temperature": 5.0}


def raw(gateway: Gateway, data: bytes, timeout_s: float = 20) -> tuple[int, dict[str, Any]]:
    """What plain bytes are answered with: the status, and the body as JSON."""
    with socket.create_connection(("127.0.0.1", gateway.settings.port), timeout_s) as connection:
        connection.sendall(data)
        received = b""
        while True:
            part = connection.recv(65536)
            if not part:
                break
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "Connection: close", f"Content-Length: {len(body)}", "", ""]).encode() + body


@contextlib.contextmanager
def neighbour_at(address: str) -> Iterator[None]:
    """A well-behaved client that asks all the time, one answer whole and one streamed; it must not see an error."""
    stop, begun, failed, answers = threading.Event(), threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=30) as http:
            while not stop.is_set() or len(answers) < 2:
                body = {
                    "messages": [{"role": "user", "content": "Hi"}],
                    "max_tokens": 2,
                    "stream": len(answers) % 2 == 1,
                }
                try:
                    answer = http.post(CHAT, json=body).raise_for_status()
                    assert answer.text.endswith("[DONE]\n\n") == body["stream"]
                    answers.append(answer)
                except (httpx.HTTPError, AssertionError) as error:
                    failed.append(error)
                    return
                finally:
                    begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert answers


@pytest.fixture
def neighbour(gateway: Gateway) -> Iterator[None]:
    """Of the gateway that the tests here share."""
    with neighbour_at(gateway.address):
        yield


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"hello\r\n\r\n", 400, id="no HTTP"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", 431, id="long header"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n",
            431,
            id="10,000 headers",
        ),
        pytest.param(
            b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            + b"".join(b"X-%d: y\r\n" % n for n in range(200))
            + b"\r\n",
            431,
            id="200 short headers",
        ),
        pytest.param(post(b"{"), 400, id="half JSON"),
        pytest.param(post(b"\xff\xfe{}"), 400, id="no UTF-8"),
        pytest.param(post(b"[" * 100_000 + b"]" * 100_000), 400, id="deep JSON"),
        pytest.param(post(b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}"), 422, id="deep messages"),
        pytest.param(
            post(
                b'{"messages": [{"role": "user", "content": "x"}], "response_format": '
                + b'{"type": "json_schema", "json_schema": {"schema": '
                + b'{"not": ' * 900
                + b"{}"
                + b"}" * 900
                + b"}}}"
            ),
            400,
            id="deep schema",
        ),
        pytest.param(post(b'{"temperature": NaN}'), 422, id="NaN"),
        pytest.param(post(gzip.compress(b"{}"), "Content-Encoding: gzip"), 415, id="compressed"),
        pytest.param(post(b"{}").replace(b"Content-Length: 2", b"Content-Length: 99999999999"), 413, id="announced"),
        pytest.param(post(b"{}").replace(b"application/json", b"text/plain"), 422, id="form of another site"),
        pytest.param(post(b"{}").replace(b"Host: localhost", b"Host: evil.example"), 421, id="DNS rebinding"),
        pytest.param(
            post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n", 400, id="bad chunk"
        ),
    ],
)
def test_what_is_malformed_gets_its_status(gateway: Gateway, data: bytes, status: int) -> None:
    found, body = raw(gateway, data)
    assert found == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]


def image_message(data: bytes | str) -> dict[str, Any]:
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (image_message(bomb()), "image_too_large"),
        (image_message("!!!not base64!!!"), "invalid_image"),
        (image_message(b"GIF89a" + b"\0" * 100), "invalid_image"),
        ({**LONG, "logit_bias": {"x": 1.0}}, "invalid_parameter"),
        ({**LONG, "messages": [{"role": "user", "content": "\ud800"}]}, "invalid_text"),
        ({**LONG, "seed": 10**40}, "422"),
        ({**LONG, "max_tokens": 2**70}, "invalid_parameter"),
        ({**LONG, "session": "x" * 10**6}, "invalid_parameter"),
    ],
)
def test_what_is_harmful_is_refused_by_name(http: httpx.Client, body: dict[str, Any], code: str) -> None:
    answer = http.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    if code != "422":
        assert answer.json()["error"]["code"] == code


@pytest.mark.effect("max_body_bytes")
def test_a_body_over_the_limit_is_413_and_the_client_hears_it(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_body_bytes=100_000)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 150_000}]})
    with neighbour_at(gateway.address):
        for content in (body, (part.encode() for part in [body[:75_000], body[75_000:]])):
            headers = {"content-type": "application/json"}
            answer = httpx.post(gateway.address + CHAT, content=content, headers=headers, timeout=20)  # type: ignore[arg-type]
            assert answer.status_code == 413
            assert "max_body_bytes" in answer.json()["error"]["message"]
        for _ in range(20):  # far over it: refused by what is announced, before any of it is read
            assert raw(gateway, post(b" " * 1000).replace(b"Length: 1000", b"Length: 250000"))[0] == 413


@pytest.mark.usefixtures("neighbour")
def test_slow_headers_are_given_up(gateway: Gateway) -> None:
    begin = time.monotonic()
    with contextlib.ExitStack() as held:
        slow = [
            held.enter_context(socket.create_connection(("127.0.0.1", gateway.settings.port), 30)) for _ in range(50)
        ]
        for connection in slow:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() - begin < 5:
            for connection in slow:
                connection.sendall(b"X: y\r\n")
            time.sleep(0.5)
        statuses = {connection.recv(65536).split()[1] for connection in slow}
    assert statuses == {b"408"}
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_body_that_breaks_off_leaves_nothing(gateway: Gateway, http: httpx.Client, how: str) -> None:
    """Neither a request in the engine nor one that is counted as being answered."""
    body = json.dumps({**LONG, "stream": True}).encode()
    with neighbour_at(gateway.address):
        for cut in (1, len(body) // 2, len(body) - 1):
            with socket.create_connection(("127.0.0.1", gateway.settings.port), 20) as connection:
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(post(body)[: cut - len(body)])
    wait_for(http, 0)
    assert "wicore_gateway_requests_in_flight 0.0" in http.get("/metrics").text


@pytest.mark.effect("body_timeout_s", "idle_timeout_s")
def test_a_body_that_does_not_come_is_given_up(start_gateway: StartGateway) -> None:
    gateway = start_gateway(idle_timeout_s=0.5, body_timeout_s=2)
    with neighbour_at(gateway.address):
        begin = time.monotonic()
        assert raw(gateway, post(b"{}").replace(b"Content-Length: 2", b"Content-Length: 500"))[0] == 408
        assert time.monotonic() - begin < 2
        with socket.create_connection(("127.0.0.1", gateway.settings.port), 20) as connection:
            connection.sendall(post(b" ").replace(b"Content-Length: 1", b"Content-Length: 500"))
            with contextlib.suppress(OSError):
                for _ in range(40):  # never idle, and yet too slow
                    connection.sendall(b" ")
                    time.sleep(0.1)
            assert connection.recv(65536).split()[1] == b"408"


def running(http: httpx.Client) -> int:
    return int(http.get("/v1/stats").json()["batch"]["running"])


def wait_for(http: httpx.Client, count: int) -> None:
    deadline = time.monotonic() + 5
    while running(http) != count:
        assert time.monotonic() < deadline, f"{running(http)} sequences run, not {count}"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_stopped_in_the_engine(gateway: Gateway, http: httpx.Client, stream: bool) -> None:
    wait_for(http, 0)
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", gateway.settings.port), 20) as connection:
        connection.sendall(post(body))
        wait_for(http, 2)
    wait_for(http, 0)


@pytest.mark.effect("send_timeout_s")
def test_who_does_not_read_is_stopped_in_the_engine(start_gateway: StartGateway, http: httpx.Client) -> None:
    wait_for(http, 0)
    gateway = start_gateway(send_timeout_s=0.5)
    # Log-probabilities make events large, so that the sockets' buffers are soon full.
    body = json.dumps({**LONG, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.settings.port))
        connection.sendall(post(body))
        wait_for(http, 8)
        deadline = time.monotonic() + 60
        while running(http):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.effect("drain_s")
def test_drain_loses_no_accepted_request_and_refuses_new_ones(start_gateway: StartGateway) -> None:
    gateway = start_gateway(drain_s=60)
    body = {**LONG, "max_tokens": 1000, "temperature": 5.0, "seed": 1}
    ends: list[tuple[str, int]] = []

    def ask(stream: bool) -> None:
        """Texts are not compared: rows that are decoded together round otherwise than one alone."""
        with httpx.Client(base_url=gateway.address, timeout=60) as http:
            if not stream:
                answer = http.post(CHAT, json=body).json()
                ends.append((answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]))
                return
            streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
            with http.stream("POST", CHAT, json=streamed) as answer:
                events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
            assert events[-1] == "[DONE]"
            *_, last, usage = [json.loads(event) for event in events[:-1]]
            ends.append((last["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]))

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=gateway.address, timeout=60) as http:
        wait_for(http, 6)
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        deadline = time.monotonic() + 5
        while http.get("/health/ready").json()["status"] != "draining":
            assert time.monotonic() < deadline
        refused = http.post(CHAT, json=body)
    for thread in [*threads, stopping]:
        thread.join()
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert ends == [("length", 1000)] * 6


def test_keys_are_asked_for_and_each_has_its_share(
    start_gateway: StartGateway, repository: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.gateway import keys
    from client.gateway.settings import KEYS_NAME

    folder = tmp_path / "repository"
    folder.mkdir()
    for path in repository.iterdir():
        (folder / path.name).symlink_to(path)
    limited, free = keys.add(folder / KEYS_NAME, "limited", 1, 4), keys.add(folder / KEYS_NAME, "free")
    address = start_gateway(repository=folder).address
    body = {**LONG, "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wk-wrong"}, {"Authorization": f"Basic {limited}"}):
        answer = httpx.post(address + CHAT, json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
    assert httpx.get(f"{address}/health/ready").status_code == 200
    headers = {"Authorization": f"Bearer {limited}"}
    with httpx.stream("POST", address + CHAT, json=SLOW, headers=headers) as held:
        assert held.status_code == 200
        lines = held.iter_lines()  # closes the answer when it goes
        assert next(lines)
        answer = httpx.post(address + CHAT, json=body, headers=headers)
        assert answer.status_code == 429
        assert "in flight" in answer.json()["error"]["message"]
    time.sleep(0.2)
    statuses = [httpx.post(address + CHAT, json=body, headers=headers).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    last = httpx.post(address + CHAT, json=body, headers=headers)
    assert 1 <= int(last.headers["retry-after"]) <= 15
    assert httpx.post(address + CHAT, json=body, headers={"Authorization": f"Bearer {free}"}).status_code == 200


def test_answers_are_compressed_and_named(http: httpx.Client) -> None:
    document = http.get("/openapi.json")
    assert document.headers["content-encoding"] == "gzip"
    assert http.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = http.get("/v1/models", headers={"X-Request-Id": "a b\tc"})
    assert odd.headers["x-request-id"] != "a b\tc"
    answer = http.post(CHAT, json={**LONG, "max_tokens": 1}, headers={"X-Request-Id": "mine-2"})
    assert answer.json()["id"].startswith("chatcmpl-mine-2-")


def test_a_client_of_http_1_0_gets_the_stream_that_others_get(gateway: Gateway) -> None:
    """It cannot read chunks, so its events take the long way."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection(("127.0.0.1", gateway.settings.port), 20) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    headers, _, old = received.decode().partition("\r\n\r\n")
    new = httpx.post(gateway.address + CHAT, json=body, timeout=60)
    assert headers.startswith("HTTP/1.1 200")
    assert "transfer-encoding" not in headers.lower()
    assert new.headers["transfer-encoding"] == "chunked"
    assert choices_of(old) == choices_of(new.text)
    assert len(choices_of(old)) >= 12


def choices_of(stream: str) -> list[Any]:
    """Of every event of a stream that is whole."""
    *events, done, rest = stream.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: "))["choices"] for event in events]
