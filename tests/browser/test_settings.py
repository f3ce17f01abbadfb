"""The settings panel and what the page tells of the swarm."""

import json

import pytest
from playwright.sync_api import Page, expect

from tests.app.site_process import SiteProcess
from tests.browser.test_chat_page import answer, ask, wait_for_end

pytestmark = pytest.mark.browser


def open_settings(page: Page):
    page.get_by_role("button", name="Settings").click()
    return page.get_by_role("dialog", name="Settings")


def test_settings_are_sent_and_kept(page: Page) -> None:
    sent: list[str] = []
    page.on("websocket", lambda ws: ws.on("framesent", lambda data: sent.append(str(data))))
    panel = open_settings(page)
    panel.get_by_label("Temperature").fill("0.3")
    panel.get_by_label("Longest answer").fill("3")
    panel.get_by_label("System prompt").fill("Be brief.")
    panel.get_by_label("Top p").fill("7")
    panel.get_by_label("Top k").focus()
    expect(panel.get_by_label("Top p")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    ask(page, "hi")
    wait_for_end(page)
    frame = next(found for found in map(json.loads, sent) if found["type"] == "generate")
    assert frame["params"] == {"temperature": 0.3, "max_new_tokens": 3}
    assert frame["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answer(page)).to_contain_text("cut at its greatest length")
    page.reload()
    panel = open_settings(page)
    expect(panel.get_by_label("Temperature")).to_have_value("0.3")
    expect(panel.get_by_label("System prompt")).to_have_value("Be brief.")
    panel.get_by_role("button", name="Back to the site’s defaults").click()
    expect(panel.get_by_label("Temperature")).to_have_value("")
    expect(panel.get_by_role("radio", name="fake-1b")).to_be_checked()


def test_missing_blocks_are_told_with_the_way_to_help(page: Page) -> None:
    models = {
        "object": "list",
        "data": [{"id": "umbel/fake-1b", "status": "incomplete", "missing_blocks": ["blocks 8–23"]}],
    }
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    note = page.get_by_role("group", name="Model")
    expect(note).to_contain_text("offline: blocks 8–23")
    note.get_by_text("Join with your machine").click()
    expect(note.locator("code")).to_have_text("umbel-node run umbel/fake-1b")
    models["data"][0].update(status="ready", missing_blocks=[])
    open_settings(page)  # asks anew
    expect(page.locator("#swarm-note")).to_be_hidden()


def test_an_answer_tells_which_nodes_served_it(page: Page) -> None:
    ask(page, "replaced")
    wait_for_end(page)
    answer(page).get_by_text("Served by 2 nodes").click()
    expect(answer(page)).to_contain_text("blocks 12–15 · \u2066…third3\u2069")


def test_the_keyboard_reaches_everything(page: Page, site: SiteProcess) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog")).to_contain_text("Copy the last block of code")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    ask(page, "hi")
    wait_for_end(page)
    page.keyboard.press("Control+Shift+;")
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def umbel")
    page.keyboard.press("Control+Shift+C")
    page.wait_for_function("() => navigator.clipboard.readText().then((text) => text.startsWith('An umbel'))")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit question")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+Escape")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.get_by_role("searchbox", name="Search chats")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("link", name="hi")).to_be_focused()
    page.keyboard.press("Control+Shift+S")
    expect(page.get_by_role("complementary", name="Chats")).to_be_hidden()
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_role("article")).to_have_count(0)
    expect(page.get_by_label("Message")).to_be_focused()
