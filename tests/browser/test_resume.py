"""Answers that go on after a reload, a lost connection and a lost site."""

import os
import signal

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.app.site_process import SiteProcess, running_site
from tests.browser.test_chat_page import NOTE_STATUS, answer, ask, wait_for_end

pytestmark = pytest.mark.browser


@pytest.fixture
def context(context: BrowserContext) -> BrowserContext:
    """Remembers its sockets, so that a test can lose them."""
    context.add_init_script(
        "window.sockets = []; window.WebSocket = class extends WebSocket {"
        " constructor(...all) { super(...all); sockets.push(this); } };"
    )
    return context


def expect_no_token_lost_or_doubled(page: Page) -> None:
    words = answer(page).locator(".body").inner_text().split()
    assert len(words) > 20
    assert words == [f"word{number}" for number in range(len(words))]


def stop_after(page: Page, word: str) -> None:
    expect(answer(page)).to_contain_text(word, timeout=20000)
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("stopped")


def test_a_reload_in_mid_answer_goes_on_with_it(page: Page, site: SiteProcess) -> None:
    ask(page, "long")
    expect(answer(page)).to_contain_text("word15")
    before = site.counts()["generated_tokens"]
    page.reload()
    stop_after(page, "word40")
    expect_no_token_lost_or_doubled(page)
    assert site.counts()["generated_tokens"] > before
    page.reload()
    expect_no_token_lost_or_doubled(page)


def test_a_lost_connection_in_mid_answer_is_told_and_resumed(page: Page) -> None:
    ask(page, "long")
    expect(answer(page)).to_contain_text("word10")
    page.evaluate(NOTE_STATUS)
    page.evaluate("sockets.at(-1).close()")
    expect(answer(page)).to_contain_text("word30", timeout=15000)
    expect(answer(page).locator(".route-notice")).to_be_hidden()
    assert "The connection was lost; connecting again…" in page.evaluate("spoken")
    stop_after(page, "word35")
    expect_no_token_lost_or_doubled(page)


def test_a_cut_answer_is_continued(page: Page) -> None:
    ask(page, "long")
    stop_after(page, "word25")
    shown = answer(page).locator(".body").inner_text()
    answer(page).get_by_role("button", name="Continue").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.wait_for_function(
        "(length) => [...document.querySelectorAll('.assistant .body')].at(-1).innerText.length > length",
        arg=len(shown),
    )
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("stopped")
    assert answer(page).locator(".body").inner_text().startswith(shown)
    expect(page.get_by_role("article")).to_have_count(2)


def test_a_site_that_forgot_the_answer_is_asked_to_continue_it(page: Page) -> None:
    with running_site("--delay", "0.03") as site:
        page.goto(site.url)
        ask(page, "long")
        expect(answer(page)).to_contain_text("word5")
        os.kill(site.counts()["pid"], signal.SIGKILL)  # gunicorn starts another worker, which knows of nothing
        expect(page.get_by_role("status")).to_contain_text("continued from what is here", timeout=30000)
        expect(page.get_by_role("article")).to_have_count(2)
        expect(answer(page)).to_contain_text("word5")
        page.get_by_role("button", name="Stop").click()
        expect(answer(page)).to_contain_text("stopped")
        ask(page, "hi")
        wait_for_end(page)
        expect(answer(page)).to_contain_text("An umbel is")
        page.goto("about:blank")
