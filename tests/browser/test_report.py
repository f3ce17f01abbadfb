"""The button that reports an answer, on the chat page and in an embedded chat."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from app.database import Database
from app.reports import Report, Reports
from tests.app.site_process import SiteProcess, running_site
from tests.browser.test_accessibility import serious
from tests.browser.test_chat_page import ask, wait_for_end

pytestmark = pytest.mark.browser

SECRET = "mirror zebra4711 is what I asked"
KEY = {"name": "k", "origins": ["http://127.0.0.1:9"]}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('reports')}/site.db"


@pytest.fixture(scope="module")
def site(database: str) -> Iterator[SiteProcess]:
    """A site that takes reports."""
    settings = {"operation": {"reports": True}, "database_url": database, "widget_keys": [KEY]}
    with running_site("--delay", "0.002", settings=settings) as process:
        yield process


def newest(database: str) -> Report:
    return Reports(Database(database), 90.0).list()[0]


def open_report(page: Page) -> None:
    page.get_by_role("button", name="Report this answer").last.click()
    expect(page.get_by_role("dialog", name="Report this answer")).to_be_visible()


def test_an_answer_is_reported_by_keyboard_without_a_word_of_it(page: Page, database: str) -> None:
    ask(page, SECRET)
    wait_for_end(page)
    button = page.get_by_role("button", name="Report this answer")
    button.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Report this answer")
    expect(dialog.get_by_role("radio").first).to_be_focused()
    assert not dialog.get_by_role("checkbox", name="Send this conversation along").is_checked()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")  # the second choice
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.type("made up")
    with page.expect_request("**/api/v2/reports") as sent:
        dialog.get_by_role("button", name="Send report").press("Enter")
    body = sent.value.post_data_json
    assert {name: body[name] for name in ("reason", "comment")} == {"reason": "false", "comment": "made up"}
    assert "conversation" not in body
    assert "zebra4711" not in str(sent.value.post_data)
    expect(page.get_by_role("status")).to_have_text("The report was sent. Thank you.")
    expect(page.get_by_role("button", name="The report was sent. Thank you.")).to_be_focused()
    kept = newest(database)
    assert (kept.reason, kept.comment, kept.model) == ("false", "made up", "umbel/fake-1b")
    assert kept.conversation is None


def test_the_conversation_goes_along_only_if_the_reader_says_so(page: Page, database: str) -> None:
    ask(page, SECRET)
    wait_for_end(page)
    open_report(page)
    page.get_by_role("radio", name="It is dangerous or hateful").check()
    page.get_by_role("checkbox", name="Send this conversation along").check()
    with page.expect_response("**/api/v2/reports"):
        page.get_by_role("button", name="Send report").click()
    assert newest(database).conversation == (("user", SECRET), ("assistant", "zebra4711 is what I asked"))


def test_a_report_that_fails_is_told(page: Page) -> None:
    page.evaluate("() => { window.fetch = async () => ({ ok: false }); }")
    ask(page, "brief")
    wait_for_end(page)
    open_report(page)
    page.get_by_role("radio", name="Something else").check()
    page.get_by_role("button", name="Send report").click()
    expect(page.get_by_text("The report could not be sent. Try again later.")).to_be_visible()
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="Report this answer")).to_be_visible()


@pytest.mark.parametrize(("scheme", "size"), [("light", (1100, 750)), ("dark", (390, 780))])
def test_the_dialog_can_be_read_in_both_themes_and_on_a_phone(page: Page, scheme: str, size: tuple[int, int]) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.set_viewport_size({"width": size[0], "height": size[1]})
    ask(page, "brief")
    wait_for_end(page)
    open_report(page)
    assert serious(page) == []
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= size[0]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    folder = os.environ.get("UMBEL_PICTURES")
    if folder:
        page.screenshot(path=Path(folder) / f"report-{scheme}{'-phone' if size[0] < 500 else ''}.png")


def test_an_embedded_chat_has_the_button(site: SiteProcess, context: BrowserContext, database: str) -> None:
    page = context.new_page()
    keys = context.request.get(f"{site.url}/test/widget-keys").json()
    page.goto(f"{site.url}/embed/{keys['k']}")
    page.wait_for_selector("#prompt:enabled")
    ask(page, "brief")
    wait_for_end(page)
    open_report(page)
    page.get_by_role("radio", name="It tells something private").check()
    with page.expect_response("**/api/v2/reports") as answered:
        page.get_by_role("button", name="Send report").click()
    assert answered.value.status == 204
    assert newest(database).reason == "private"
    assert page.evaluate("violations") == []
