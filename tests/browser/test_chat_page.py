"""The chat page as a person uses it."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.app.site_process import SiteProcess, running_site

pytestmark = pytest.mark.browser


PAINTED = "() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))"


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    page.evaluate(PAINTED)  # until then the page looks as if nothing was asked


def wait_for_end(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=15000)


def answer(page: Page):
    return page.get_by_role("article", name="Umbel").last


def test_tokens_arrive_one_by_one_and_are_counted(page: Page, site: SiteProcess) -> None:
    page.evaluate(
        """() => {
          window.lengths = new Set();
          new MutationObserver(() => {
            const body = [...document.querySelectorAll('.assistant .body')].at(-1);
            if (body) lengths.add(body.textContent.length);
          }).observe(document.getElementById('messages'), {subtree: true, childList: true, characterData: true});
        }"""
    )
    ask(page, "What is an umbel?")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Generating")
    wait_for_end(page)
    assert page.evaluate("lengths.size") > 20
    assert answer(page).locator("pre code").inner_text().startswith("def umbel(num_flowers: int)")
    expect(answer(page).locator("p")).to_have_count(3)
    expect(answer(page)).to_contain_text(re.compile(r"\d+(\.\d)? tokens/s · first token after \d+ ms|s"))
    expect(page.get_by_role("status")).to_contain_text("Answer complete. An umbel is")
    expect(page.locator("#context-text")).to_have_text(re.compile(r"^\d+ of 2,048 tokens$"))
    expect(page.get_by_label("Message")).to_be_focused()


def test_stop_keeps_the_session_and_the_next_turn_sends_only_what_is_new(page: Page, site: SiteProcess) -> None:
    ask(page, "long one")
    expect(answer(page)).to_contain_text("word3")
    opened = site.counts()
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("stopped")
    expect(page.get_by_label("Message")).to_be_focused()
    ask(page, "next")
    wait_for_end(page)
    expect(answer(page)).to_contain_text("An umbel is")
    counts = site.counts()
    assert counts["open_sessions"] == opened["open_sessions"]
    assert counts["appended_tokens"] - opened["appended_tokens"] <= 6
    assert counts["cancels"] > opened["cancels"]


def test_new_chat_starts_over(page: Page) -> None:
    ask(page, "long one")
    expect(answer(page)).to_contain_text("word3")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    ask(page, "hi")
    wait_for_end(page)
    expect(page.get_by_role("article")).to_have_count(2)
    expect(answer(page)).to_contain_text("An umbel is")


@pytest.mark.parametrize(("question", "words"), [("lost", "machine left"), ("full", "full right now"), ("bug", "log")])
def test_errors_are_told_plainly_and_can_be_retried(page: Page, question: str, words: str) -> None:
    ask(page, question)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(words)
    assert "secret of the stack" not in page.content()
    first = alert.element_handle()
    alert.get_by_role("button", name="Retry").click()
    first.wait_for_element_state("hidden")
    expect(alert).to_contain_text(words)
    ask(page, "hi")
    wait_for_end(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answer(page)).to_contain_text("An umbel is")


NOTE_STATUS = """() => {
  window.spoken = [];
  const status = document.getElementById('status');
  const note = () => spoken.push(status.textContent);
  new MutationObserver(note).observe(status, {childList: true, characterData: true, subtree: true});
}"""


@pytest.mark.parametrize("width", [320, 1100])
def test_a_lost_machine_is_told_in_the_answer_and_a_note_of_it_stays(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.evaluate(NOTE_STATUS)
    ask(page, "replaced")
    notice = answer(page).locator(".route-notice")
    expect(notice).to_have_text(re.compile(r"^Waiting: blocks 12–15 have no node\.29 s left$"))
    expect(answer(page)).to_contain_text("one two")
    expect(notice).to_have_text("Going on.")
    wait_for_end(page)
    expect(notice).to_be_hidden()
    expect(answer(page)).to_contain_text("went on after a machine was missing, 1.5 s lost")
    spoken = page.evaluate("spoken")
    assert [text for text in spoken if text.startswith("Waiting")] == ["Waiting: blocks 12–15 have no node."]
    assert spoken.index("Going on.") > spoken.index("A volunteer’s machine left; looking for another…")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # the disclosure is the last thing before the message field
    report = answer(page).get_by_role("group", name="Where the time went").get_by_role("table")
    expect(report.first).to_contain_text("Lost machines")
    expect(report.last).to_contain_text("blocks 12–15 · \u2066…other2\u2069")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_wait_in_vain_keeps_the_text_and_can_be_retried(page: Page) -> None:
    ask(page, "vanish")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("offline right now: blocks 12–15")
    expect(answer(page)).to_contain_text("one two")
    expect(answer(page)).to_contain_text("broken off")
    expect(answer(page).locator(".route-notice")).to_be_hidden()
    alert.get_by_role("button", name="Retry").click()
    expect(answer(page).locator(".route-notice")).to_contain_text("no node")
    expect(page.get_by_role("article")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("stopped")


def test_markup_in_messages_stays_text(page: Page) -> None:
    ask(page, "<img src=https://evil.example/x onerror=alert(1)> <b>hi</b>")
    wait_for_end(page)
    assert page.locator("#messages img, #messages b").count() == 0
    expect(page.get_by_role("article", name="You")).to_contain_text("<b>hi</b>")


def test_shift_enter_makes_a_line_and_an_input_method_keeps_enter(page: Page) -> None:
    field = page.get_by_label("Message")
    field.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert field.input_value() == "one\ntwo"
    for event in ("{key: 'Enter', isComposing: true}", "{key: 'Enter', keyCode: 229}"):
        init = event.replace("}", ", bubbles: true, cancelable: true}")
        field.evaluate(f"(field) => field.dispatchEvent(new KeyboardEvent('keydown', {init}))")
    expect(page.get_by_role("article")).to_have_count(0)
    low = field.evaluate("(field) => field.clientHeight")
    field.fill("\n".join("abcdefgh"))
    assert field.evaluate("(field) => field.clientHeight") > low


def test_the_theme_is_the_systems_until_one_is_chosen(page: Page) -> None:
    surface = "() => getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(surface)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(surface) != dark
    page.get_by_role("button", name="Change to dark colours").click()
    assert page.evaluate(surface) == dark
    page.reload()
    assert page.evaluate(surface) == dark
    page.get_by_role("button", name="Change to light colours").click()
    assert page.evaluate(surface) != dark


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    ask(page, "What is an umbel? " + "x" * 300)
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#scroller").evaluate("(element) => element.scrollWidth - element.clientWidth") <= 0
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width


def test_the_end_is_followed_only_by_readers_who_are_there(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 420})
    ask(page, "long")
    expect(answer(page)).to_contain_text("word100", timeout=15000)
    at_end = "(element) => element.scrollHeight - element.scrollTop - element.clientHeight < 60"
    scroller = page.locator("#scroller")
    assert scroller.evaluate(at_end)
    scroller.evaluate("(element) => { element.scrollTop = 0; }")
    expect(answer(page)).to_contain_text("word130")
    assert scroller.evaluate("(element) => element.scrollTop") < 5
    page.get_by_role("button", name="Latest").click()
    expect(page.get_by_role("button", name="Latest")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("stopped")


def test_a_restart_is_told_and_followed(page: Page) -> None:
    with running_site("--delay", "0.03") as site:
        page.goto(site.url)
        ask(page, "stuck")
        expect(answer(page)).to_contain_text("one two")
        site.process.terminate()
        expect(page.get_by_role("alert")).to_contain_text("restarting")
        site.process.wait(20)
    with running_site("--delay", "0.001", "--port", site.url.rpartition(":")[2]):
        ask(page, "hi")
        expect(answer(page)).to_contain_text("all bloom this way", timeout=30_000)
        page.goto("about:blank")
