"""How long the page's frames take while a very long answer streams in: `python -m bench.page`.

    python -m bench.page [--kinds mixed,list,code,table,paragraph] [--lines 1200] [--delay 0.002]

Headless Chromium on a site whose model computes nothing. A frame is what the page's main thread does from the first
callback of an animation frame until it is free again: reading markdown, changing elements, style, layout, paint. Those
of the last tenth of the answer are listed apart: work that grows with the answer shows there.
"""

import argparse
import json
import statistics
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from bench.machine import describe_machine
from tests.app.fake_swarm import PIECES
from tests.app.markdown_answers import huge
from tests.app.site_process import running_site

CHROMIUM = Path("/usr/bin/chromium")
MAX_TOKENS = 60_000
LIMITS = {"generation": {"session_max_length": 100_000, "max_new_tokens": MAX_TOKENS}}

WATCH_FRAMES = """
  window.frames_ms = [];
  const { port1, port2 } = new MessageChannel();
  const real = requestAnimationFrame.bind(window);
  let began = null;
  port1.onmessage = () => { frames_ms.push(performance.now() - began); began = null; };
  window.requestAnimationFrame = (callback) => real((now) => {
    if (began === null) { began = performance.now(); port2.postMessage(null); }
    callback(now);
  });
"""


def frames_of(page: Page, url: str, kind: str, num_lines: int) -> list[float]:
    """Return the milliseconds of every frame of one answer."""
    page.goto(url)
    page.get_by_label("Message").fill(f"huge {kind} {num_lines}")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=600_000)
    expect(page.get_by_role("alert")).to_have_count(0)
    found: list[float] = page.evaluate("frames_ms")
    return found


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="mixed,list,code,table,paragraph")
    parser.add_argument("--lines", type=int, default=1200)
    parser.add_argument("--delay", type=float, default=0.002, help="seconds a token")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    print("| answer | tokens | frames | ms, median | 90 % | 99 % | longest | of the last tenth, median | 90 % |")
    print("|---" * 9 + "|")
    arguments = ("--delay", str(options.delay), "--max-length", "100000")
    with running_site(*arguments, settings=json.loads(json.dumps(LIMITS))) as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        for kind in options.kinds.split(","):
            page = browser.new_context(viewport={"width": 1100, "height": 800}).new_page()
            page.add_init_script(WATCH_FRAMES)
            frames = frames_of(page, site.url, kind, options.lines)
            last = frames[-max(2, len(frames) // 10) :]
            cuts, last_cuts = (statistics.quantiles(some, n=100, method="inclusive") for some in (frames, last))
            tokens = len(PIECES.findall(huge(kind, options.lines)))
            cells = [cuts[49], cuts[89], cuts[98], max(frames), last_cuts[49], last_cuts[89]]
            print(
                f"| {kind} | {tokens} | {len(frames)} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |",
                flush=True,
            )
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main()
