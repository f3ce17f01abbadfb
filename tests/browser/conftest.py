"""Headless Chromium on a site with a fake model; every test ends with a look at what the page must never do."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.app.site_process import SiteProcess, running_site

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

# Runs before the page's own scripts, and remembers every rule of the policy that was broken.
WATCH_POLICY = """
  window.violations = [];
  addEventListener('securitypolicyviolation', ({ violatedDirective, blockedURI }) => {
    violations.push(`${violatedDirective} ${blockedURI}`);
  });
"""


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """A site whose model takes 30 ms a token."""
    with running_site("--delay", "0.03") as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser with a fresh profile."""
    if not CHROMIUM.exists():
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A window of its own, with nothing stored."""
    found = browser.new_context(viewport={"width": 1100, "height": 750})
    found.set_default_timeout(8000)
    found.add_init_script(WATCH_POLICY)
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, site: SiteProcess) -> Iterator[Page]:
    """The chat page; afterwards: no violation of its policy, no request elsewhere, no error."""
    found = context.new_page()
    hosts: set[str] = set()
    problems: list[str] = []
    found.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    found.on("websocket", lambda ws: hosts.add(urlsplit(ws.url).netloc))
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    found.goto(site.url)
    found.wait_for_selector("#prompt:enabled")  # the language has come, and the page is at work
    yield found
    assert found.evaluate("violations") == []
    assert {host.rsplit(":", 1)[0] for host in hosts if host} == {"127.0.0.1"}
    assert [problem for problem in problems if "ERR_CONNECTION_REFUSED" not in problem] == []
