"""Asking on the page: pictures, answers as they grow, stop, figures, what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from builders.demo.evaluate import sample_picture
from client import Client
from client.server.gateway import Gateway
from tests.server.gateway.page.conftest import OpenPage, answer, ask, drop, endless, idle, png, running, transfer, until


def tier(page: Page, name: str) -> float:
    return float(page.locator(f'[data-tier="{name}"] [role=meter]').get_attribute("aria-valuenow") or "-1")


def drawn_width(page: Page, name: str) -> float:
    return float(page.locator(f'[data-tier="{name}"] rect').nth(1).get_attribute("width") or "-1")


def test_a_dropped_picture_is_answered_right_and_the_tiers_fill(open_page: OpenPage, client: Client) -> None:
    page = open_page()
    picture, question, right = sample_picture(1)
    before, drawn = tier(page, "device"), drawn_width(page, "device")
    drop(page, png(picture))
    expect(page.locator(".waiting-picture img")).to_have_count(1)
    said = ask(page, question)
    assert said == client.generate(question, images=[picture]).text.strip()
    assert said == right
    assert page.locator(".message.user .shown-pictures img").evaluate("image => image.naturalWidth") == picture.width
    until(page, "before => document.querySelector('[data-tier=device] [role=meter]').ariaValueNow > before", before)
    assert drawn_width(page, "device") > drawn
    figures = page.locator(".message.assistant .row").inner_text()
    assert re.search(r"[\d.]+ m?s first token", figures)
    assert "nothing reused" in figures
    ask(page, "How many shapes are there?")
    again = page.locator(".message.assistant .row").nth(1).inner_text()
    reused = re.search(r"prompt (\d+) · reused: Device (\d+)", again)
    assert reused, again
    assert 0 < int(reused[2]) < int(reused[1])


def test_an_answer_grows_shows_its_slot_and_stops_in_the_engine(open_page: OpenPage, gateway: Gateway) -> None:
    idle(gateway.address)
    page = open_page()
    endless(page)
    page.fill("#message", "Hi")
    page.press("#message", "Enter")
    text = page.locator(".message.assistant .text")
    lengths = []
    for _ in range(4):
        longer = "least => document.querySelector('.assistant .text')?.textContent.length > least"
        until(page, longer, lengths[-1] if lengths else 0)
        lengths.append(len(text.text_content() or ""))
    assert lengths == sorted(set(lengths))
    expect(page.locator(".cells .lit")).to_have_count(1)
    until(page, "Number(document.querySelector('#speed').textContent.replace(/\\D/g, '')) > 0")
    assert page.locator(".spark .line").count() == 1
    assert running(gateway.address) == 1
    page.click("#stop")
    expect(page.locator(".message.assistant .row")).to_contain_text("Stopped")
    idle(gateway.address)
    kept = text.text_content()
    assert kept
    page.unroute("**/v1/chat/completions")
    assert ask(page, "Hello")
    assert text.first.text_content() == kept
    assert page.is_visible("#send")


def test_pictures_come_by_paste_and_by_button_and_can_be_taken_back(open_page: OpenPage, client: Client) -> None:
    page = open_page()
    picture, question, _ = sample_picture(2)
    page.evaluate(
        "(held) => document.activeElement.dispatchEvent("
        "new ClipboardEvent('paste', { clipboardData: held, bubbles: true, cancelable: true }))",
        transfer(page, png(picture), "pasted.png"),
    )
    expect(page.locator(".waiting-picture")).to_have_count(1)
    page.set_input_files("#files", [{"name": "second.png", "mimeType": "image/png", "buffer": png(picture)}])
    expect(page.locator(".waiting-picture")).to_have_count(2)
    page.get_by_role("button", name="Remove second.png").click()
    expect(page.locator(".waiting-picture")).to_have_count(1)
    assert ask(page, question) == client.generate(question, images=[picture]).text.strip()


def test_what_the_server_would_not_read_is_drawn_anew_or_named(open_page: OpenPage) -> None:
    page = open_page()
    sent: list[str] = []
    page.on("request", lambda asked: sent.append(asked.post_data or "") if "completions" in asked.url else None)
    drop(page, png(Image.new("RGB", (6000, 5000), "red")), "huge.png")  # 30 megapixels
    expect(page.locator(".waiting-picture")).to_have_count(1)
    ask(page, "Describe the picture.")
    (url,) = re.findall(r"data:image/jpeg;base64,[^\"]+", sent[0])
    assert len(url) < 500_000
    expect(page.locator(".shown-pictures img")).to_have_attribute("alt", "Picture: huge.png, 2048 × 1707")
    drop(page, b"nothing of the kind", "notes.txt", "text/plain")
    expect(page.locator("#notice")).to_contain_text("notes.txt is no picture")
    expect(page.locator(".waiting-picture")).to_have_count(0)


def test_settings_go_into_the_request_and_stay(open_page: OpenPage, client: Client) -> None:
    page = open_page()
    page.click("#open-settings")
    page.fill("#set-system", "Answer in Chinese.")
    page.fill("#set-temperature", "1.5")
    for name, value in {"max_tokens": "9", "seed": "4", "top_p": "0.9", "top_k": "30"}.items():
        page.fill(f"#set-{name}", value)
    page.keyboard.press("Escape")
    said = ask(page, "Hello")
    messages = [{"role": "system", "content": "Answer in Chinese."}, {"role": "user", "content": "Hello"}]
    direct = client.generate(messages=messages, temperature=1.5, max_tokens=9, seed=4, top_p=0.9, top_k=30)
    assert said == direct.text.strip()
    page.reload()
    page.click("#open-settings")
    assert page.input_value("#set-temperature") == "1.5"
    assert page.input_value("#set-top_k") == "30"
    page.get_by_role("button", name="Reset").click()
    assert page.input_value("#set-top_k") == ""
    assert page.input_value("#set-system") == ""


def test_an_answer_at_its_limit_says_so_and_comes_again(open_page: OpenPage) -> None:
    page = open_page()
    page.click("#open-settings")
    page.fill("#set-max_tokens", "3")
    page.keyboard.press("Escape")
    short = ask(page, "Hello")
    expect(page.locator(".message.assistant .aside")).to_contain_text("limit of answer tokens")
    page.click("#open-settings")
    page.fill("#set-max_tokens", "")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".message.assistant .aside")).to_have_count(0)
    whole = answer(page, 0)
    assert whole.startswith(short)
    assert len(whole) > len(short)
    assert page.locator(".message").count() == 2
    page.hover(".message.user")
    page.get_by_role("button", name="Edit").click()
    assert page.locator(".message").count() == 0
    assert page.input_value("#message") == "Hello"


def test_conversations_stay_in_the_browser_and_can_be_saved(
    open_page: OpenPage, gateway: Gateway, tmp_path: Path
) -> None:
    page = open_page()
    picture, question, _ = sample_picture(1)
    drop(page, png(picture))
    said = ask(page, question)
    page.reload()
    expect(page.locator(".chat")).to_have_count(1)
    page.click(".chat")
    assert answer(page, 0) == said
    expect(page.locator(".shown-pictures img")).to_have_count(1)
    page.click("#export")
    with page.expect_download() as saved:
        page.get_by_role("button", name="As JSON").click()
    path = tmp_path / "saved.json"
    saved.value.save_as(path)
    body = json.loads(path.read_text(encoding="utf-8"))
    asked = {"model": body["model"], "messages": body["messages"][:1]}
    sent_again = httpx.post(f"{gateway.address}/v1/chat/completions", json=asked, timeout=30).json()
    assert sent_again["choices"][0]["message"]["content"].strip() == said
    page.click("#export")
    with page.expect_download() as saved:
        page.get_by_role("button", name="As Markdown").click()
    saved.value.save_as(path)
    assert said in path.read_text(encoding="utf-8")
    page.get_by_role("button", name=re.compile("^Delete")).click()
    expect(page.locator(".chat")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".chat")).to_have_count(1)
    page.get_by_role("button", name=re.compile("^Delete")).click()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".chat")).to_have_count(0)


HOSTILE = """# Title
<img src=x onerror="window.hit = 1"><script>window.hit = 2</script>

[click](javascript:window.hit=3) and ![far](http://example.invalid/p.png) and [good](https://example.invalid/)

- **bold** `a < b` & more
- [x] done

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<b>")
```
"""


def test_markdown_is_shown_and_what_is_hostile_in_it_is_text(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("./markdown.js");
          const node = document.createElement("div");
          node.id = "tried";
          document.body.append(node);
          const view = new MarkdownView(node);
          for (let end = 1; end <= text.length; end += 7) view.update(text.slice(0, end));
          view.update(text);
        }""",
        HOSTILE,
    )
    tried = page.locator("#tried")
    for wanted in ("h3", "strong", "table td.to-right", "ul li input:checked", ".code pre code", "ul code"):
        assert tried.locator(wanted).count() == 1, wanted
    assert tried.locator("img, script").count() == 0
    links = tried.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert links == ["http://example.invalid/p.png", "https://example.invalid/"]
    shown = tried.text_content() or ""
    assert '<img src=x onerror="window.hit = 1">' in shown
    assert 'print("<b>")' in shown
    assert "a < b" in shown
    assert page.evaluate("window.hit") is None


def test_the_browser_itself_refuses_other_servers_and_html_from_text(open_page: OpenPage) -> None:
    page = open_page(expected=("Connecting to", "Refused to connect", "This document requires", "Fetch API cannot"))
    with pytest.raises(Exception, match="Failed to fetch"):
        page.evaluate("fetch('http://127.0.0.1:9/')")
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<p>'")
