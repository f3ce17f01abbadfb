"""Several conversations: kept, found again, renamed, exported, imported and deleted."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.app.site_process import SiteProcess
from tests.browser.test_chat_page import answer, ask, wait_for_end

pytestmark = pytest.mark.browser


def chats(page: Page):
    return page.get_by_role("navigation", name="Chats").get_by_role("listitem")


def test_conversations_stay_and_can_be_opened_again(page: Page) -> None:
    ask(page, "echo one")
    wait_for_end(page)
    page.get_by_role("button", name="New chat").click()
    ask(page, "echo two")
    wait_for_end(page)
    expect(chats(page)).to_have_count(2)
    page.reload()
    expect(page.get_by_role("article", name="You")).to_contain_text("echo two")
    expect(answer(page)).to_contain_text("answer.")
    page.get_by_role("link", name="echo one").click()
    expect(page.get_by_role("article", name="You")).to_contain_text("echo one")
    page.go_back()
    expect(page.get_by_role("article", name="You")).to_contain_text("echo two")
    ask(page, "echo three")
    wait_for_end(page)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(4)


def test_a_conversation_is_found_renamed_and_deleted(page: Page) -> None:
    for question in ("hi umbel", "echo Dill"):
        page.get_by_role("button", name="New chat").click()
        ask(page, question)
        wait_for_end(page)
    field = page.get_by_role("searchbox", name="Search chats")
    field.fill("DILL fennel")  # one in the question's title, both in the other's answer
    expect(chats(page)).to_have_count(1)
    expect(chats(page)).to_contain_text("fennel")
    field.fill("nowhere")
    expect(page.get_by_text("Nothing found.")).to_be_visible()
    field.fill("")
    page.get_by_role("button", name="Rename “echo Dill”").click()
    page.get_by_role("textbox", name="Name").fill("Herbs")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Herbs")).to_be_visible()
    page.reload()
    page.get_by_role("button", name="Delete “Herbs”").click()
    page.get_by_role("button", name="Cancel").click()
    expect(chats(page)).to_have_count(2)
    page.get_by_role("button", name="Delete “Herbs”").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chats(page)).to_have_count(1)
    expect(page.get_by_role("article")).to_have_count(0)  # it was the one that is shown
    page.reload()
    expect(chats(page)).to_have_count(1)


def test_what_is_exported_can_be_imported(page: Page, tmp_path: Path) -> None:
    ask(page, "echo one")
    wait_for_end(page)
    page.get_by_text("Export, import, delete").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save this chat as Markdown").click()
    assert saved.value.suggested_filename == "echo-one.md"
    assert Path(saved.value.path()).read_text() == "# echo one\n\n## You\n\necho one\n\n## Umbel\n\nanswer.\n\nHuman:\n"
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save all chats as JSON").click()
    text = Path(saved.value.path()).read_text()
    assert [chat["messages"][0]["content"] for chat in json.loads(text)["conversations"]] == ["echo one"]
    page.get_by_role("button", name="Delete all chats").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chats(page)).to_have_count(0)
    broken, whole = tmp_path / "broken.json", tmp_path / "chats.json"
    broken.write_text(text[:-10])
    whole.write_text(text)
    page.locator("#import-file").set_input_files(broken)
    expect(page.get_by_role("status")).to_have_text("This file holds no chats that could be read")
    page.locator("#import-file").set_input_files(whole)
    expect(page.get_by_role("status")).to_have_text("1 chat was read")
    page.reload()
    page.get_by_role("link", name="echo one").click()
    expect(answer(page)).to_contain_text("answer.")


def test_a_temporary_chat_leaves_nothing(page: Page) -> None:
    page.get_by_role("button", name="Temporary chat").click()
    expect(page.locator("#temporary-note")).to_be_visible()
    ask(page, "echo secret")
    wait_for_end(page)
    expect(chats(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    expect(chats(page)).to_have_count(0)


def test_a_browser_that_stores_nothing_can_chat(context: BrowserContext, site: SiteProcess) -> None:
    context.add_init_script(
        "for (const name of ['indexedDB', 'localStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});"
    )
    page = context.new_page()
    page.goto(site.url)
    expect(page.get_by_text("This browser refuses to store chats")).to_be_visible()
    ask(page, "echo one")
    wait_for_end(page)
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("link", name="echo one").click()
    expect(answer(page)).to_contain_text("answer.")
    assert page.evaluate("violations") == []


def test_the_list_is_a_drawer_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 700})
    ask(page, "echo one")
    wait_for_end(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("complementary", name="Chats")).to_be_hidden()
    toggle = page.get_by_role("button", name="Chats")
    toggle.click()
    expect(page.get_by_role("complementary", name="Chats")).to_be_visible()
    assert page.locator("#page").evaluate("(element) => element.inert")
    page.keyboard.press("Escape")
    expect(toggle).to_be_focused()
    toggle.click()
    page.get_by_role("link", name="echo one").click()
    expect(page.get_by_role("complementary", name="Chats")).to_be_hidden()
    expect(answer(page)).to_contain_text("answer.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
