"""The chat on other people's pages: on those that may show it, on those that may not, and under attack."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, FrameLocator, Page, WebSocketRoute, expect

from tests.app.site_process import SiteProcess, running_site
from tests.browser.host_pages import Host, running_host
from tests.browser.test_accessibility import serious

pytestmark = pytest.mark.browser

BUTTON = "<button id=before>Before</button><p>Some text.</p>"
Show = Callable[..., Page]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Pages of an origin that may show the chat."""
    with running_host("127.0.0.1") as found:
        yield found


@pytest.fixture(scope="module")
def stranger() -> Iterator[Host]:
    """Pages of an origin that may not."""
    with running_host("localhost") as found:
        yield found


@pytest.fixture(scope="module")
def site(host: Host) -> Iterator[SiteProcess]:
    """A site with a key for pages of `host`."""
    key = {"name": "host", "origins": [host.url], "system_prompt": "Sell umbels.", "theme": "auto"}
    with running_site("--delay", "0.005", settings={"widget_keys": [key]}) as process:
        yield process


@pytest.fixture(scope="module")
def key(site: SiteProcess) -> str:
    found: str = httpx.get(f"{site.url}/test/widget-keys").json()["host"]
    return found


@pytest.fixture(autouse=True)
def patience(context: BrowserContext) -> Iterator[None]:
    """A page, its frame and two servers take their time on a busy machine."""
    context.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture
def show(context: BrowserContext, host: Host, site: SiteProcess, key: str) -> Show:
    """Shows a page with the widget; `data` are attributes of its script, `headers` the page's own."""

    def make(body: str = BUTTON, *, on: Host = host, headers: dict[str, str] | None = None, **data: str) -> Page:
        attributes = "".join(
            f' data-{name.replace("_", "-")}="{value}"' for name, value in {"key": key, **data}.items()
        )
        script = f'<script async src="{site.url}/widget/v1.js"{attributes}></script>'
        page = context.new_page()
        page.goto(on.put("/", body + script, **headers or {}))
        page.locator("umbel-chat").wait_for(state="attached")
        return page

    return make


def launcher(page: Page):
    return page.locator("umbel-chat .launcher")


def panel(page: Page):
    return page.locator("umbel-chat .panel")


def frame_of(page: Page) -> FrameLocator:
    return page.frame_locator("umbel-chat iframe")


def opened(page: Page) -> FrameLocator:
    """Open the chat; return its frame when it is at work."""
    launcher(page).click()
    found = frame_of(page)
    found.locator("#prompt:enabled").wait_for()
    return found


def ask(frame: FrameLocator, text: str) -> None:
    frame.locator("#prompt").fill(text)
    frame.locator("#prompt").press("Enter")


def answers(frame: FrameLocator):
    return frame.locator(".assistant[aria-busy=false] .body")


def events(page: Page) -> Any:
    return page.evaluate("window.seen")


LISTEN = """<script>
  window.seen = [];
  for (const name of ['ready', 'open', 'close', 'unread', 'sent', 'answered', 'refused'])
    document.addEventListener('umbel-chat:' + name, ({ detail }) => seen.push([name, detail.count ?? null]));
</script>"""


# where it may be


def test_nothing_is_asked_for_before_the_chat_is_opened(show: Show, context: BrowserContext, site: SiteProcess) -> None:
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = show()
    expect(launcher(page)).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if url.startswith(site.url)] == [f"{site.url}/widget/v1.js"]
    frame = opened(page)
    ask(frame, "prompt")
    expect(answers(frame)).to_have_text("Sell umbels.")
    assert {re.sub(r"(\d)/.*", r"\1", url) for url in asked} == {site.url, page.url.rstrip("/")}
    assert context.cookies() == []
    assert page.evaluate("violations") == []
    assert page.frames[1].evaluate("violations") == []


def test_the_focus_goes_in_with_opening_and_back_with_escape(show: Show) -> None:
    page = show(LISTEN + BUTTON)
    assert launcher(page).get_attribute("aria-expanded") == "false"
    frame = opened(page)
    expect(frame.get_by_label("Message")).to_be_focused()
    expect(launcher(page)).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("dialog", name="Chat")).to_be_visible()
    ask(frame, "long")
    expect(frame.locator(".assistant")).to_contain_text("word5")
    page.keyboard.press("Escape")  # ends the answer first
    expect(frame.locator(".assistant")).to_contain_text("stopped")
    page.keyboard.press("Escape")
    expect(panel(page)).to_be_hidden()
    expect(launcher(page)).to_be_focused()
    page.locator("#before").focus()
    page.evaluate("UmbelChat.open()")
    expect(frame.get_by_label("Message")).to_be_focused()
    frame.get_by_role("button", name="Close").click()
    expect(panel(page)).to_be_hidden()
    expect(page.locator("#before")).to_be_focused()
    assert [name for name, _ in events(page)] == ["open", "ready", "sent", "answered", "close", "open", "close"]


def test_what_came_while_it_was_closed_is_counted(show: Show) -> None:
    page = show()
    frame = opened(page)
    ask(frame, "stuck")
    expect(frame.locator(".assistant")).to_contain_text("two")
    page.evaluate("UmbelChat.close()")
    page.frames[1].evaluate("document.getElementById('stop').click()")  # else it would come at some time
    expect(launcher(page)).to_have_accessible_name("Open the chat (1 unread)")
    expect(page.locator("umbel-chat .badge")).to_have_text("1")
    launcher(page).click()
    expect(launcher(page)).to_have_accessible_name("Close the chat")
    expect(answers(frame)).to_contain_text("one two")
    launcher(page).click()
    expect(launcher(page)).to_have_accessible_name("Open the chat")


def test_commands_may_come_before_the_script(show: Show) -> None:
    early = """<script>
      window.UmbelChat = window.UmbelChat || [];
      UmbelChat.push(['on', 'answered', () => { document.title = 'answered'; }]);
      UmbelChat.push(['context', 'A page on dill.'], ['send', 'prompt']);
    </script>"""
    page = show(early)
    expect(answers(frame_of(page))).to_contain_text("Sell umbels.")
    expect(answers(frame_of(page))).to_contain_text("A page on dill.")
    expect(page).to_have_title("answered")
    page.evaluate("UmbelChat.prefill('and fennel?')")
    expect(frame_of(page).get_by_label("Message")).to_have_value("and fennel?")
    page.evaluate("UmbelChat.destroy()")
    expect(page.locator("umbel-chat")).to_have_count(0)
    page.evaluate("UmbelChat.open()")  # to nobody


def test_a_chat_goes_on_on_the_next_page(show: Show) -> None:
    page = show()
    frame = opened(page)
    ask(frame, "brief")
    expect(answers(frame)).to_have_text("yes")
    page.reload()
    page.locator("umbel-chat").wait_for(state="attached")
    frame = opened(page)
    expect(answers(frame)).to_have_text("yes")
    frame.get_by_role("button", name="New chat").click()
    expect(frame.locator(".assistant")).to_have_count(0)
    ask(frame, "brief")
    expect(answers(frame)).to_have_text("yes")
    page.clock.set_fixed_time(time.time() + 25 * 3600)
    page.reload()
    page.locator("umbel-chat").wait_for(state="attached")
    expect(opened(page).locator(".assistant")).to_have_count(0)  # after a day


def test_it_works_where_nothing_can_be_stored(show: Show, context: BrowserContext) -> None:
    context.add_init_script(
        """for (const name of ['localStorage', 'sessionStorage', 'indexedDB'])
             Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } });"""
    )
    frame = opened(show())
    ask(frame, "brief")
    expect(answers(frame)).to_have_text("yes")


def test_an_inline_chat_is_as_high_as_what_it_holds(show: Show) -> None:
    page = show(mode="inline")
    frame = frame_of(page)
    frame.locator("#prompt:enabled").wait_for()
    expect(launcher(page)).to_be_hidden()
    expect(page.locator("#before")).not_to_be_focused()
    box = page.locator("umbel-chat")
    page.wait_for_function("document.querySelector('umbel-chat').style.getPropertyValue('--auto') !== ''")
    before = box.evaluate("(element) => element.offsetHeight")
    ask(frame, "hi")
    expect(answers(frame)).to_contain_text("An umbel is")
    page.wait_for_function(f"document.querySelector('umbel-chat').offsetHeight > {before} + 50")
    assert box.evaluate("(element) => element.offsetHeight <= 0.9 * innerHeight + 1")
    expect(frame.get_by_role("button", name="Close")).to_be_hidden()


def test_theme_language_and_title_are_the_pages(show: Show) -> None:
    page = show(lang="ar", theme="dark", title="<b>Ask</b>", accent="#ffe14d")
    frame = opened(page)
    expect(frame.locator("html")).to_have_attribute("dir", "rtl")
    expect(frame.locator("html")).to_have_attribute("data-theme", "dark")
    expect(frame.get_by_role("heading", level=1)).to_have_text("<b>Ask</b>")
    expect(launcher(page)).to_have_accessible_name("إغلاق الدردشة")
    colour = "getComputedStyle(document.documentElement).getPropertyValue('--on-accent')"
    assert page.frames[1].evaluate(colour) == "#000000"
    page.locator("umbel-chat").evaluate("(element) => { element.setAttribute('theme', 'light'); element.lang = 'fr'; }")
    expect(frame.locator("html")).to_have_attribute("data-theme", "light")
    expect(frame.locator("html")).to_have_attribute("dir", "ltr")
    expect(frame.get_by_label("Message")).to_have_attribute("placeholder", re.compile("message"))


def test_a_phone_is_filled(browser: Browser, host: Host, site: SiteProcess, key: str) -> None:
    with browser.new_context(viewport={"width": 390, "height": 700}, has_touch=True) as context:
        context.set_default_timeout(30_000)
        page = context.new_page()
        script = f"<script async src='{site.url}/widget/v1.js' data-key={key}></script>"
        page.goto(host.put("/", f"<main>{BUTTON}</main><aside inert>Was so before.</aside>{script}"))
        launcher(page).tap()
        frame_of(page).locator("#prompt:enabled").wait_for()
        assert panel(page).bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 700}
        expect(page.get_by_role("dialog")).to_have_attribute("aria-modal", "true")
        assert page.evaluate("document.querySelector('main').inert")
        page.set_viewport_size({"width": 390, "height": 400})  # as a keyboard leaves it
        page.wait_for_function(
            "document.querySelector('umbel-chat').shadowRoot.querySelector('.panel').offsetHeight === 400"
        )
        frame_of(page).get_by_role("button", name="Close").click()
        expect(panel(page)).to_be_hidden()
        assert not page.evaluate("document.querySelector('main').inert")
        assert page.evaluate("document.querySelector('aside').inert")
        expect(launcher(page)).to_be_focused()


# where it may not be


def test_an_origin_that_the_key_does_not_name_gets_a_word_and_a_link(
    show: Show, stranger: Host, site: SiteProcess, key: str
) -> None:
    page = show(LISTEN, on=stranger)
    page.clock.install()
    launcher(page).click()
    page.clock.run_for(10_000)
    refused = panel(page).get_by_role("alert")
    expect(refused).to_contain_text("The chat cannot be shown on this page.")
    expect(refused.get_by_role("link")).to_have_attribute("href", f"{site.url}/embed/{key}")
    assert ["ready", None] not in events(page)
    with page.expect_popup() as popup:
        refused.get_by_role("link").click()
    alone = popup.value
    alone.locator("#prompt:enabled").wait_for()
    alone.locator("#prompt").fill("prompt")
    alone.keyboard.press("Enter")
    expect(alone.locator(".assistant .body")).to_have_text("Sell umbels.")


def test_a_key_that_is_unknown_is_refused_as_well(show: Show) -> None:
    page = show(key="wk_nobody")
    page.clock.install()
    launcher(page).click()
    page.clock.run_for(10_000)
    expect(panel(page).get_by_role("alert")).to_be_visible()
    page.keyboard.press("Escape")
    expect(panel(page)).to_be_hidden()
    expect(launcher(page)).to_be_focused()


def test_a_hostile_policy_that_allows_the_frame_breaks_nothing(show: Show, site: SiteProcess) -> None:
    policy = f"default-src 'none'; script-src {site.url}; frame-src {site.url}; require-trusted-types-for 'script'"
    isolated = {"Cross_Origin_Embedder_Policy": "require-corp", "Cross_Origin_Opener_Policy": "same-origin"}
    page = show(headers={"Content_Security_Policy": policy, **isolated})
    assert page.evaluate("crossOriginIsolated")
    frame = opened(page)
    assert page.locator("umbel-chat .panel").evaluate("(element) => getComputedStyle(element).position") == "fixed"
    ask(frame, "brief")
    expect(answers(frame)).to_have_text("yes")
    assert page.evaluate("violations") == []


def test_a_hostile_policy_without_the_frame_gets_a_word_and_a_link(show: Show, site: SiteProcess) -> None:
    page = show(headers={"Content_Security_Policy": f"default-src 'none'; script-src {site.url}"})
    launcher(page).click()
    refused = panel(page).get_by_role("alert")
    expect(refused).to_contain_text("The chat cannot be shown on this page.")
    expect(refused.get_by_role("link")).to_be_focused()
    assert page.evaluate("violations.filter((each) => !each.startsWith('frame-src')).length") == 0


# forged messages

FORGED = """<script>
  const say = (target) => {
    for (const type of ['open', 'close', 'ready']) target.postMessage({ ns: 'umbel-chat', v: 1, type }, '*');
    target.postMessage({ ns: 'umbel-chat', v: 1, type: 'unread', count: 7 }, '*');
    target.postMessage({ ns: 'umbel-chat', v: 1, type: 'resize', height: 9000 }, '*');
    for (const type of ['send', 'prefill', 'context'])
      target.postMessage({ ns: 'umbel-chat', v: 1, type, text: 'spam' }, '*');
    target.postMessage({ ns: 'umbel-chat', v: 1, type: 'set', theme: 'dark', heading: 'spam' }, '*');
  };
  addEventListener('message', ({ data }) => {
    if (data !== 'go') return;
    say(parent);
    for (let at = 0; at < parent.length; at++) if (parent[at] !== window) say(parent[at]);
    parent.postMessage('done', '*');
  });
</script>"""


WRONG = """(origin) => {
  const target = document.getElementById('chat').contentWindow;
  const known = { ns: 'umbel-chat', v: 1 };
  const forms = [{ type: 'send', text: 'spam' }, { ...known, v: 2, type: 'send', text: 'spam' }, null, 'x',
    { ...known, type: 'constructor' }, { ...known, type: 'send', text: {} },
    { ...known, type: 'set', theme: 'x onload=1', lang: '../../x', accent: 'red;background:url(x)' }];
  for (const form of forms) target.postMessage(form, origin);
}"""


def forge(page: Page) -> None:
    """Have the stranger in the page send what it can to everybody there."""
    page.evaluate(
        """() => new Promise((resolve) => {
          addEventListener('message', ({ data }) => data === 'done' && resolve());
          document.getElementById('forger').contentWindow.postMessage('go', '*');
        })"""
    )


def test_the_page_ignores_forged_messages(show: Show, stranger: Host) -> None:
    stranger.put("/forger", FORGED)
    page = show(LISTEN + BUTTON + f"<iframe id=forger src='{stranger.url}/forger'></iframe>")
    frame = opened(page)
    before = events(page)
    forge(page)
    ask(frame, "brief")  # what was to come of the forged ones came before this
    expect(answers(frame)).to_have_text("yes")
    expect(panel(page)).to_be_visible()
    assert [name for name, _ in events(page)[len(before) :]] == ["sent", "answered"]
    assert page.evaluate("document.querySelector('umbel-chat').style.getPropertyValue('--auto')") == ""


def test_the_chat_ignores_forged_messages(
    context: BrowserContext, host: Host, stranger: Host, site: SiteProcess, key: str
) -> None:
    stranger.put("/forger", FORGED)
    chat = f"<iframe id=chat src='{site.url}/embed/{key}'></iframe>"  # in no shadow tree, so that others can reach it
    page = context.new_page()
    page.goto(host.put("/", f"{chat}<iframe id=forger src='{stranger.url}/forger'></iframe>"))
    frame = page.frame_locator("#chat")
    frame.locator("#prompt:enabled").wait_for()
    forge(page)
    page.evaluate(WRONG, site.url)  # by the right page, but nothing that the bridge has
    ask(frame, "brief")
    expect(answers(frame)).to_have_text("yes")
    expect(frame.locator(".user")).to_have_count(1)
    expect(frame.get_by_label("Message")).to_have_value("")
    expect(frame.get_by_role("heading", level=1)).to_have_text("Chat")
    assert page.frames[1].evaluate("document.documentElement.style.getPropertyValue('--accent')") == ""
    mine = "{ ns: 'umbel-chat', v: 1, type: 'prefill', text: 'mine' }"
    page.evaluate(f"() => document.getElementById('chat').contentWindow.postMessage({mine}, '*')")
    expect(frame.get_by_label("Message")).to_have_value("mine")


# the embed page by itself


def test_a_token_that_is_refused_is_fetched_anew(page_of_key: Page, site: SiteProcess) -> None:
    page = page_of_key
    sockets: list[WebSocketRoute] = []

    def forge(ws: WebSocketRoute) -> None:
        sockets.append(ws)
        server, is_first = ws.connect_to_server(), len(sockets) == 1
        token = r'"embed": ?"[^"]+"'
        ws.on_message(lambda text: server.send(re.sub(token, '"embed":"forged"', str(text)) if is_first else text))

    page.route_web_socket("**/api/v2/generate", forge)
    page.reload()
    page.locator("#prompt:enabled").wait_for()
    page.evaluate("document.getElementById('prompt').value = 'brief'")  # typing would connect
    page.locator("#prompt").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("This chat was idle for too long.")
    with page.expect_request("**/token"):
        page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .body")).to_have_text("yes")


@pytest.fixture
def page_of_key(context: BrowserContext, site: SiteProcess, key: str) -> Page:
    """The embed page in a window of its own."""
    page = context.new_page()
    page.goto(f"{site.url}/embed/{key}")
    page.locator("#prompt:enabled").wait_for()
    return page


def test_it_has_no_serious_fault_of_access(page_of_key: Page, show: Show) -> None:
    page_of_key.emulate_media(reduced_motion="reduce")
    assert serious(page_of_key) == []
    page_of_key.locator("#prompt").fill("rich")
    page_of_key.keyboard.press("Enter")
    page_of_key.locator(".assistant[aria-busy=false]").wait_for()
    schemes: list[Any] = ["light", "dark"]
    for scheme in schemes:
        page_of_key.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert serious(page_of_key) == [], scheme
    assert page_of_key.evaluate("document.documentElement.scrollWidth <= innerWidth")
    around = show("<main><h1>A page</h1><p>Some text.</p></main>")
    opened(around)
    assert serious(around) == []


# the page that writes snippets


def test_a_snippet_is_written_and_shown(context: BrowserContext, host: Host, site: SiteProcess, key: str) -> None:
    page = context.new_page()
    page.goto(f"{site.url}/widget")
    page.get_by_label("Widget key").fill(key)
    page.get_by_label("Title").fill('Ask "us"')
    page.get_by_label("Pin this version").check()
    line = page.locator("#snippet").inner_text()
    assert 'data-title="Ask &quot;us&quot;"' in line
    opened(page)
    expect(page.get_by_role("dialog", name='Ask "us"')).to_be_visible()
    assert serious(page) == []
    assert page.evaluate("violations") == []
    other = context.new_page()
    other.goto(host.put("/snippet", line))  # with the hash of the pinned version
    opened(other)
    expect(other.get_by_role("dialog", name='Ask "us"')).to_be_visible()
    for form, selector in {"element": "umbel-chat iframe", "iframe": "iframe"}.items():
        page.get_by_label("Form").select_option(form)
        other.goto(host.put("/snippet", page.locator("#snippet").inner_text()))
        other.frame_locator(selector).locator("#prompt:enabled").wait_for()
        page.frame_locator(f"#preview {selector}").locator("#prompt:enabled").wait_for()
