"""The states of the chat page, each brought about as a person would: for the tests of access, and for pictures.

    python -m tests.browser.page_states FOLDER

writes a sheet of each state into FOLDER: light, dark, on a phone, and from right to left.
"""

import base64
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, Route, WebSocketRoute, sync_playwright

from tests.app.site_process import SiteProcess, running_site

MODELS = "umbel/fake-1b,umbel/fake-7b"
SETTINGS = {"generation": {"running_max": 1}}
SIDES = {"light": (760, 620), "dark": (760, 620), "phone": (390, 620), "right to left": (760, 620)}

Show = Callable[[Page, str], None]


def _ask(page: Page, text: str) -> None:
    """Ask; whatever language the page has."""
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def _wait_for_end(page: Page, index: int = 0) -> None:
    ended = page.locator(".assistant").nth(index).and_(page.locator("[aria-busy=false]"))
    ended.wait_for(state="attached", timeout=30_000)


def _answered(page: Page, text: str) -> None:
    num_before = page.locator(".assistant").count()
    _ask(page, text)
    _wait_for_end(page, num_before)


def _empty(_page: Page, _url: str) -> None:
    return


def _answer(page: Page, _url: str) -> None:
    _answered(page, "arabic" if page.locator("html").get_attribute("dir") == "rtl" else "rich")
    page.locator(".assistant .katex").first.wait_for()
    page.locator(".assistant").last.scroll_into_view_if_needed()


def _who_served(page: Page, _url: str) -> None:
    _answered(page, "replaced")
    page.locator("details.times summary").first.click()


def _queued(page: Page, url: str) -> None:
    body = {"messages": [{"role": "user", "content": "stuck"}], "stream": True}
    stack = ExitStack()  # keeps the site's only place busy while the page is open
    stack.enter_context(httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30))
    page.once("close", lambda _: stack.close())
    _ask(page, "hi")
    page.locator(".stage:visible").wait_for()


def _waiting(page: Page, _url: str) -> None:
    _ask(page, "vanish")
    page.locator(".route-notice[data-kind=waiting] .notice-time:not(:empty)").wait_for()


def _failed(page: Page, _url: str) -> None:
    _answered(page, "vanish")
    page.locator(".alert").wait_for()


def _too_long(page: Page, _url: str) -> None:
    _answered(page, "hi")
    _ask(page, "word " * 2100)
    page.locator(".alert").wait_for()


def _stopped(page: Page, _url: str) -> None:
    _ask(page, "long")
    page.get_by_text("word12").wait_for()
    page.keyboard.press("Escape")
    _wait_for_end(page)


def _versions(page: Page, _url: str) -> None:
    _answered(page, "hi")
    page.locator(".assistant .foot .icon-button:visible").last.click()
    page.locator(".assistant .versions:visible").wait_for()
    _wait_for_end(page)


def _edited(page: Page, _url: str) -> None:
    _answered(page, "hi")
    page.locator("#prompt").focus()
    page.keyboard.press("ArrowUp")
    page.locator(".edit-form").wait_for()


def _chats(page: Page, _url: str) -> None:
    for text in ("brief", "letters"):
        _answered(page, text)
        page.locator("#new-chat").click()
    if page.locator("#sidebar").is_hidden():
        page.locator("#sidebar-toggle").click()
    page.locator("#sidebar details.files summary").click()


def _deleting(page: Page, url: str) -> None:
    _chats(page, url)
    page.locator("#chats li .icon-button").last.click()
    page.locator("dialog[open]").wait_for()


def _temporary(page: Page, _url: str) -> None:
    page.locator("#temporary").click()
    _answered(page, "brief")


def _settings(page: Page, _url: str) -> None:
    _answered(page, "brief")
    page.locator("#settings-open").click()
    page.locator("#sampling input").first.wait_for()


def _shortcuts(page: Page, _url: str) -> None:
    page.keyboard.press("Control+/")
    page.locator("dialog[open]").wait_for()


def _incomplete(page: Page, _url: str) -> None:
    models = [{"id": "umbel/fake-1b", "status": "incomplete", "missing_blocks": ["blocks 8–23"]}]

    def fulfill(route: Route) -> None:
        route.fulfill(json={"object": "list", "data": models})

    page.route("**/v1/models", fulfill)
    page.locator("#swarm-note summary").click()


def _lost(page: Page, _url: str) -> None:
    found: list[WebSocketRoute] = []

    def route(ws: WebSocketRoute) -> None:
        found.append(ws)
        if len(found) == 1:  # the others get no answer
            ws.connect_to_server()

    page.route_web_socket("**/api/v2/generate", route)
    _ask(page, "long")
    page.get_by_text("word12").wait_for()
    found[0].close(code=1012)
    page.locator(".route-notice[data-kind=reconnecting]").wait_for()


STATES: dict[str, Show] = {
    "empty": _empty,
    "answer": _answer,
    "queued": _queued,
    "waiting for a node": _waiting,
    "who served": _who_served,
    "failed": _failed,
    "too long": _too_long,
    "stopped": _stopped,
    "versions": _versions,
    "edited": _edited,
    "chats": _chats,
    "deleting": _deleting,
    "temporary": _temporary,
    "settings": _settings,
    "shortcuts": _shortcuts,
    "part of the model offline": _incomplete,
    "connection lost": _lost,
}


def _picture(browser: Browser, site: SiteProcess, show: Show, side: str) -> bytes:
    width, height = SIDES[side]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if side == "dark" else "light",
        locale="ar" if side == "right to left" else "en",
        has_touch=side == "phone",
        reduced_motion="reduce",
    )
    with context:
        page = context.new_page()
        page.goto(site.url)
        page.wait_for_selector("#prompt:enabled")
        show(page, site.url)
        page.wait_for_timeout(150)
        return page.screenshot()


def main(folder: Path) -> None:
    """Write the sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    with running_site("--delay", "0.01", "--models", MODELS, settings=SETTINGS) as site, sync_playwright() as found:
        browser = found.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page(viewport={"width": 2780, "height": 640})
        for name, show in STATES.items():
            pictures = [base64.b64encode(_picture(browser, site, show, side)).decode() for side in SIDES]
            sheet.set_content(
                "<body style='margin:10px;display:flex;gap:20px;background:#888;width:max-content'>"
                + "".join(f"<img src='data:image/png;base64,{picture}'>" for picture in pictures)
            )
            path = folder / f"{name.replace(' ', '-')}.jpg"
            sheet.screenshot(path=path, type="jpeg", quality=70)
            print(path, flush=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
