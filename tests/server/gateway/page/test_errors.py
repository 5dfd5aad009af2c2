"""What goes wrong is said on the page in plain words, with what to do."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from client import Client
from client.gateway import keys
from client.gateway.settings import KEYS_NAME
from client.server.gateway import Gateway
from python_backends.errors import (
    AuthenticationError,
    ContextLengthError,
    DeadlineExceededError,
    ImageCountError,
    ImagesNotSupportedError,
    InvalidImageError,
    OverloadedError,
    RateLimitedError,
    ServerUnavailableError,
)
from tests.server.gateway.conftest import StartGateway
from tests.server.gateway.page.conftest import SETTINGS, OpenPage, answer, ask, drop, endless, idle, png, until

REFUSED = "Failed to load resource"  # Chromium's own word for a status that is an error


def error(page: Page, words: str) -> None:
    expect(page.locator(".error")).to_contain_text(words)


def send(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def test_what_is_too_large_or_too_often(open_page: OpenPage, start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_body_bytes=50_000, max_image_pixels=10_000, max_requests_per_minute=30)
    page = open_page(gateway.address, (REFUSED,))
    drop(page, png(Image.effect_noise((300, 300), 80)))
    send(page, "What is it?")
    error(page, "The message is larger than this server takes")
    error(page, "The server says: the body is larger than 50,000 bytes")
    page.click("#new-chat")
    drop(page, png(Image.new("RGB", (200, 200), "red")))
    send(page, "What is it?")
    error(page, "The picture is larger than this server takes. Use a smaller one.")
    page.click("#new-chat")
    page.click("#open-settings")
    page.select_option("#set-language", "zh")
    page.keyboard.press("Escape")
    once = "fetch('v1/completions', {method: 'POST', body: '{}'})"
    page.evaluate(f"Promise.all(Array.from({{length: 31}}, () => {once})).then(() => 0)")
    send(page, "你好")
    error(page, "此密钥的额度暂时用完。请在 2 秒后重试。")
    page.wait_for_timeout(2100)  # a thirtieth of a minute
    page.get_by_role("button", name="重试").click()
    assert answer(page, 0)
    assert page.locator(".message").count() == 2


def test_a_full_server_says_so_and_answers_when_it_has_room(
    open_page: OpenPage, gateway: Gateway, client: Client
) -> None:
    page = open_page(expected=(REFUSED,))
    slots, places = int(SETTINGS["max_batch_size"]), int(SETTINGS["max_queue"])
    crowd = client.stream("Hi", n=slots + places, max_tokens=5000, ignore_eos=True, temperature=5.0)
    with contextlib.closing(crowd):
        next(crowd)
        expect(page.locator("#gauges")).to_contain_text(f"{places} waiting")
        send(page, "Hello")
        for _ in range(2):
            error(page, "The server has more to do than it can take. Your message is kept: try again in a moment.")
            error(page, f"The server says: {places} requests are waiting already")
            with page.expect_response("**/v1/chat/completions") as refused:
                page.get_by_role("button", name="Try again").click()
            assert (refused.value.status, refused.value.header_value("retry-after")) == (503, "1")
        expect(page.locator("#connection")).to_have_text("Connected")
    idle(gateway.address)
    page.get_by_role("button", name="Try again").click()
    assert answer(page, 0)
    assert page.locator(".error").count() == 0
    assert page.locator(".message").count() == 2


def test_a_server_that_wants_a_key(
    open_page: OpenPage, start_gateway: StartGateway, tiered: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(tiered, folder, symlinks=True)
    key = keys.add(folder / KEYS_NAME, "page")
    page = open_page(start_gateway(repository=folder).address, (REFUSED,))
    expect(page.locator("#connection")).to_have_text("The server wants an API key")
    expect(page.locator("#set-key")).to_be_focused()
    page.keyboard.type("wk-wrong")
    page.keyboard.press("Escape")
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    error(page, "The server wants a valid API key.")
    page.get_by_role("button", name="Enter the key").click()
    page.fill("#set-key", key)
    page.keyboard.press("Escape")
    expect(page.locator("#connection")).to_have_text("Connected")
    assert ask(page, "Hello")


def test_a_server_that_goes_away_in_the_middle_and_comes_back(open_page: OpenPage, start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    page = open_page(gateway.address, (REFUSED,))
    endless(page)
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    until(page, "document.querySelector('.assistant .text')?.textContent.length > 20")
    gateway.kill()
    error(page, "The connection was lost in the middle of the answer.")
    assert len(page.locator(".assistant .text").inner_text()) > 20
    expect(page.locator("#connection")).to_have_text("No connection to the server")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    error(page, "The server cannot be reached.")
    gateway.start()
    page.get_by_role("button", name="Try again").click()
    assert answer(page, 0)
    expect(page.locator("#connection")).to_have_text("Connected")


def test_what_the_server_may_answer_has_words_in_both_languages(open_page: OpenPage) -> None:
    words = open_page().evaluate("import('./words.js').then((found) => found.WORDS)")
    errors = (OverloadedError, ServerUnavailableError, DeadlineExceededError, ContextLengthError, ImageCountError)
    for each in (*errors, ImagesNotSupportedError, InvalidImageError, AuthenticationError, RateLimitedError):
        name = f"err_{each.code}"
        assert words["en"][name] != words["zh"][name]
