"""The states of the status page, with made-up swarms: for the tests of access, and for pictures.

    python -m tests.browser.swarm_states FOLDER

writes a sheet of each state into FOLDER: light, dark, and on a phone.
"""

import base64
import sys
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

from tests.app.site_process import SiteProcess, running_site

STATES = ("complete", "degraded", "incomplete")
SETTINGS = {"initial_peers": ["/ip4/192.0.2.1/tcp/31330/p2p/12D3KooWFirstPeerOfTheOperator"]}
SIDES = {"light": (1000, "light"), "dark": (1000, "dark"), "phone": (390, "light")}
MAX_HEIGHT = 1500


def set_swarm(site: SiteProcess, name: str) -> None:
    """Have the site's models served as `tests.app.swarms` says under `name`."""
    httpx.post(f"{site.url}/test/swarm/{name}", headers={"Origin": site.url}, timeout=5).raise_for_status()


def _picture(browser: Browser, site: SiteProcess, side: str) -> bytes:
    width, scheme = SIDES[side]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en")  # type: ignore[arg-type]
    with context:
        page = context.new_page()
        page.goto(f"{site.url}/swarm")
        page.locator("#theme:visible").wait_for()
        height = min(MAX_HEIGHT, page.evaluate("document.documentElement.scrollHeight"))
        return page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})


def main(folder: Path) -> None:
    """Write the sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    with running_site(settings=SETTINGS) as site, sync_playwright() as found:
        browser = found.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page(viewport={"width": 1500, "height": 950})
        for name in STATES:
            set_swarm(site, name)
            pictures = [base64.b64encode(_picture(browser, site, side)).decode() for side in SIDES]
            sheet.set_content(
                "<body style='margin:10px;display:flex;align-items:start;gap:20px;background:#888;width:max-content'>"
                + "".join(f"<img style='zoom:0.6' src='data:image/png;base64,{picture}'>" for picture in pictures)
            )
            path = folder / f"swarm-{name}.jpg"
            sheet.screenshot(path=path, type="jpeg", quality=75, full_page=True)
            print(path, flush=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
