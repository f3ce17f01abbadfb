"""Versions of messages: edit, another answer, and going back and forth between them."""

import pytest
from playwright.sync_api import Page, expect

from tests.app.fake_swarm import ANSWER
from tests.app.site_process import SiteProcess
from tests.browser.test_chat_page import answer, ask, wait_for_end

pytestmark = pytest.mark.browser


def question(page: Page):
    return page.get_by_role("article", name="You").last


def edit_last(page: Page, text: str) -> None:
    question(page).get_by_role("button", name="Edit question").click()
    page.get_by_role("textbox", name="Edit question").fill(text)
    page.keyboard.press("Enter")


def test_an_edited_message_makes_a_branch_and_the_session_rewinds(page: Page, site: SiteProcess) -> None:
    ask(page, "echo first words of a conversation")
    wait_for_end(page)
    ask(page, "echo something")
    wait_for_end(page)
    before = site.counts()
    edit_last(page, "hi")
    wait_for_end(page)
    expect(answer(page)).to_contain_text("An umbel is")
    counts = site.counts()
    assert counts["open_sessions"] == before["open_sessions"]
    assert counts["appended_tokens"] - before["appended_tokens"] <= 6  # and not the first turn again
    expect(question(page)).to_contain_text("2/2")
    question(page).get_by_role("button", name="Previous version").click()
    expect(question(page)).to_contain_text("echo something")
    expect(answer(page)).to_contain_text("answer.")
    expect(page.get_by_role("status")).to_have_text("Version 1 of 2")
    question(page).get_by_role("button", name="Next version").click()
    expect(answer(page)).to_contain_text("An umbel is")
    ask(page, "echo more")
    wait_for_end(page)
    expect(page.get_by_role("article")).to_have_count(6)


def test_another_answer_stands_beside_the_first(page: Page) -> None:
    ask(page, "long one")
    expect(answer(page)).to_contain_text("word3")
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("stopped")
    answer(page).get_by_role("button", name="Another answer").click()
    expect(answer(page)).to_contain_text("word2")
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("stopped")
    expect(answer(page)).to_contain_text("2/2")
    answer(page).get_by_role("button", name="Previous version").click()
    expect(answer(page)).to_contain_text("1/2")
    expect(answer(page)).to_contain_text("word3")
    expect(page.get_by_role("article")).to_have_count(2)


def test_an_edit_can_be_left_and_sends_nothing(page: Page) -> None:
    ask(page, "echo a")
    wait_for_end(page)
    question(page).get_by_role("button", name="Edit question").click()
    field = page.get_by_role("textbox", name="Edit question")
    expect(field).to_be_focused()
    field.fill("other")
    page.keyboard.press("Escape")
    expect(field).to_have_count(0)
    expect(question(page)).to_contain_text("echo a")
    expect(page.get_by_role("button", name="Previous version")).to_have_count(0)


def test_an_answer_is_copied_as_it_was_written(page: Page, site: SiteProcess) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    ask(page, "hi")
    wait_for_end(page)
    page.get_by_role("button", name="Copy answer").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER
