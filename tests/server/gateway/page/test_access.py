"""The page for everybody: both languages, keyboard alone, a phone, dark and light, axe."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from builders.demo.evaluate import sample_picture
from client import Client
from client.server.gateway import Gateway
from tests.server.gateway.page.conftest import OpenPage, answer, ask, drop, endless, idle, png, until

PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}


def test_the_browsers_language_is_spoken_and_another_can_be_chosen(open_page: OpenPage, client: Client) -> None:
    page = open_page(locale="zh-TW")
    assert page.get_attribute("html", "lang") == "zh-CN"
    expect(page.locator("#welcome h2")).to_have_text("对图片提问")
    picture, question, right = sample_picture(3, "zh")
    drop(page, png(picture))
    assert ask(page, question) == client.generate(question, images=[picture]).text.strip() == right
    expect(page.locator(".row")).to_contain_text("首个词元")
    page.click("#open-settings")
    page.select_option("#set-language", "en")
    expect(page.locator("#settings-title")).to_have_text("Settings")
    page.keyboard.press("Escape")
    expect(page.locator(".row")).to_contain_text("first token")
    assert page.locator(".assistant .text").inner_text().strip() == right, "what was said stays"
    page.reload()
    assert page.get_attribute("html", "lang") == "en"
    words = page.evaluate("import('./words.js').then((found) => found.WORDS)")
    assert set(words["en"]) == set(words["zh"])
    assert open_page(locale="fr-FR").get_attribute("html", "lang") == "en"


def test_the_keyboard_does_everything(open_page: OpenPage, gateway: Gateway) -> None:
    idle(gateway.address, 30)
    page = open_page()
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#message") == "Hello\nthere"
    page.keyboard.press("Enter")
    answer(page, 0)
    expect(page.locator("#message")).to_be_focused()
    endless(page)
    page.keyboard.type("More")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.assistant .text')[1]?.textContent.length > 20")
    page.keyboard.press("Escape")
    expect(page.locator(".row").nth(1)).to_contain_text("Stopped")
    idle(gateway.address)
    reached = tab_through(page)
    assert {"new-chat", "export", "open-settings", "add-picture", "message", "send"} <= set(reached)
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()
    page.focus("#export")
    page.keyboard.press("Enter")
    expect(page.locator("[data-export=markdown]")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#export")).to_be_focused()


def tab_through(page: Page) -> list[str]:
    """The ids of what Tab reaches, once around; each shows that it has the focus."""
    page.evaluate("document.activeElement.blur()")
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const node = document.activeElement;
              const style = getComputedStyle(node);
              const around = node.closest(".entry");
              const shown = style.outlineStyle !== "none" || (around && getComputedStyle(around).borderColor);
              return node === document.body ? null : [node.id, Boolean(shown)];
            }"""
        )
        if found is not None:  # None: around, through the browser's own
            assert found[1], f"{found[0]} does not show the focus"
            reached.append(found[0])
    return reached


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page: OpenPage) -> None:
    page = open_page(**PHONE)

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    assert fits()
    page.locator("#samples button").first.tap()
    assert "3 shapes" in answer(page, 0)
    page.fill("#message", "How many shapes are there?")
    page.locator("#send").tap()
    assert answer(page, 1) == "There are 3 shapes."
    assert fits()
    expect(page.locator("#live")).not_to_be_visible()
    page.locator("[data-open=live]").tap()
    expect(page.locator('[data-tier="device"]')).to_be_in_viewport()
    page.locator("[data-close=live]").tap()
    expect(page.locator("#live")).not_to_be_visible()
    page.locator("[data-open=chats]").tap()
    expect(page.locator(".chat")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#chats")).not_to_be_visible()
    for button in page.locator(".bar button:visible, .composer button:visible").all():
        box = button.bounding_box()
        assert box
        assert min(box["width"], box["height"]) >= 40, "a finger must hit it"


def serious(page: Page) -> list[tuple[str, str]]:
    """What axe finds of WCAG 2.2 AA and its own best practices that matters."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    "profile",
    [{"locale": "en-US", "color_scheme": "light"}, {"locale": "zh-CN", "color_scheme": "dark", **PHONE}],
    ids=["desk", "phone"],
)
def test_axe_finds_nothing_serious(open_page: OpenPage, profile: dict[str, Any]) -> None:
    page = open_page(reduced_motion="reduce", bypass_csp=True, **profile)
    assert serious(page) == []
    page.locator("#samples button").first.click()
    answer(page, 0)
    if "is_mobile" in profile:
        page.click("[data-open=live]")
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.click("#open-settings")
    assert serious(page) == []
    page.select_option("#set-theme", "light" if profile["color_scheme"] == "dark" else "dark")
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.click("#export")
    assert serious(page) == []


def test_dark_and_light_follow_the_system_until_one_is_chosen(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.click("#open-settings")
    page.select_option("#set-theme", "light")
    assert page.evaluate(paper) != dark
    page.reload()
    assert page.evaluate(paper) != dark
