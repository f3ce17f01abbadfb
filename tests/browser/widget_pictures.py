"""Pictures of the chat on somebody else's page, for docs/widget.md.

python -m tests.browser.widget_pictures FOLDER
"""

import sys
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

from tests.app.site_process import SiteProcess, running_site
from tests.browser.host_pages import Host, running_host

PAGE = """
<style>
  :root { color-scheme: light dark; }
  body { margin: 0; font: 17px/1.6 Georgia, serif; background: Canvas; color: CanvasText; }
  header { padding: 1rem 2rem; background: light-dark(#e9f0e4, #222b22); font-weight: bold; }
  main { max-width: 34rem; padding: 1rem 2rem; }
</style>
<header>Gardens of the North</header>
<main>
  <h1>Dill, fennel, carrot</h1>
  <p>Many plants of the kitchen garden bloom in umbels: flower heads of many small flowers, each on a stalk of its own,
     and all stalks meet in one point.</p>
  <p>Sow dill in rows from April on, a hand apart, and let some of it bloom: the flowers feed hoverflies, and the seeds
     keep for years.</p>
  <p>Carrots bloom in their second year only. Leave two or three in the ground if you want seeds of your own.</p>
</main>
"""
SIZES = {"closed": (900, 660), "open": (900, 660), "phone": (390, 660)}


def _picture(browser: Browser, url: str, state: str, scheme: str, path: Path) -> None:
    width, height = SIZES[state]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        has_touch=state == "phone",
        reduced_motion="reduce",
    )
    with context:
        page = context.new_page()
        page.goto(url)
        page.locator("umbel-chat .launcher").wait_for()
        if state != "closed":
            page.locator("umbel-chat .launcher").click()
            frame = page.frame_locator("umbel-chat iframe")
            frame.locator("#prompt:enabled").wait_for()
            frame.locator("#prompt").fill("What is an umbel?")
            frame.locator("#prompt").press("Enter")
            frame.locator(".assistant[aria-busy=false]").wait_for()
            frame.locator(".hljs-keyword").first.wait_for()
            page.wait_for_timeout(150)
        page.screenshot(path=path, type="jpeg", quality=70)


def _all(browser: Browser, host: Host, site: SiteProcess, folder: Path) -> None:
    key = httpx.get(f"{site.url}/test/widget-keys").json()["garden"]
    title = 'data-title="Ask the gardener"'
    url = host.put("/", f'{PAGE}<script async src="{site.url}/widget/v1.js" data-key="{key}" {title}></script>')
    for state in SIZES:
        for scheme in ("light", "dark"):
            path = folder / f"{state}-{scheme}.jpg"
            _picture(browser, url, state, scheme, path)
            print(path, flush=True)


def main(folder: Path) -> None:
    """Write the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with running_host() as host:
        keys = [{"name": "garden", "origins": [host.url]}]
        with running_site("--delay", "0.005", settings={"widget_keys": keys}) as site, sync_playwright() as found:
            arguments = ["--no-sandbox", "--disable-gpu"]
            browser = found.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
            _all(browser, host, site, folder)
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
