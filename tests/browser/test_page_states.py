"""Every state of the page: free of serious faults of access in both themes, and never wider than a phone."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from tests.app.site_process import SiteProcess, running_site
from tests.browser.page_states import MODELS, SETTINGS, STATES
from tests.browser.test_accessibility import serious
from tests.browser.test_chat_page import answer, ask, wait_for_end

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """A site with two models, on which one answer is written at a time."""
    with running_site("--delay", "0.01", "--models", MODELS, settings=SETTINGS) as process:
        yield process


@pytest.mark.parametrize("name", [name for name in STATES if name != "answer"])  # see test_accessibility.py
def test_a_state_has_no_serious_fault_of_access(page: Page, site: SiteProcess, name: str) -> None:
    page.emulate_media(reduced_motion="reduce")
    STATES[name](page, site.url)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        assert serious(page) == [], scheme
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_another_model_takes_another_session(page: Page) -> None:
    opened: list[str] = []
    page.on("websocket", lambda ws: ws.on("framesent", lambda data: opened.append(str(data))))
    ask(page, "hi")
    wait_for_end(page)
    page.locator("#model-button").click()
    page.get_by_role("radio", name="fake-7b").check()
    page.keyboard.press("Escape")
    expect(page.locator("#model-name")).to_have_text("fake-7b")
    ask(page, "hi again")
    wait_for_end(page)
    assert [frame for frame in opened if '"open"' in frame][-1].count("umbel/fake-7b") == 1
    expect(answer(page)).to_contain_text("An umbel is")
    page.reload()
    expect(page.locator("#model-name")).to_have_text("fake-7b")


def test_slow_answers_are_told_with_the_way_to_help(page: Page) -> None:
    def slow(ws: WebSocketRoute) -> None:
        server = ws.connect_to_server()
        server.on_message(lambda text: ws.send(re.sub(r'("tokens_per_s": ?)[\d.]+', r"\g<1>0.4", str(text))))

    page.route_web_socket("**/api/v2/generate", slow)
    ask(page, "brief")
    wait_for_end(page)
    note = page.get_by_role("group", name="Model")
    expect(note).to_contain_text("Too slow?")
    note.get_by_text("Join with your machine").click()
    expect(note.locator("code")).to_have_text("umbel-node run umbel/fake-1b")


def test_a_connection_without_a_sign_of_life_is_given_up(page: Page) -> None:
    routes: list[WebSocketRoute] = []
    silent: list[WebSocketRoute] = []

    def route(ws: WebSocketRoute) -> None:
        routes.append(ws)
        ws.connect_to_server().on_message(lambda text: None if ws in silent else ws.send(text))

    page.route_web_socket("**/api/v2/generate", route)
    page.clock.install()
    ask(page, "long")
    expect(answer(page)).to_contain_text("word5")
    silent.extend(routes)
    page.clock.fast_forward(15_000)
    expect(page.locator(".route-notice")).to_be_hidden()
    page.clock.fast_forward(8_000)
    expect(page.locator(".route-notice")).to_contain_text("connecting again")
    page.clock.resume()
    wait_for_end(page)
    words = answer(page).locator(".body").inner_text().split()
    assert words == [f"word{number}" for number in range(400)]
