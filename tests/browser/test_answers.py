"""What an answer's markdown becomes on the page, and what it must never become."""

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.app.markdown_answers import VECTORS
from tests.app.site_process import SiteProcess
from tests.browser.test_chat_page import answer, ask, wait_for_end

pytestmark = pytest.mark.browser

ELEMENTS = {
    "A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DIV", "EM", "FIGURE", "H3", "H4", "H5", "H6", "HR", "INPUT", "LI", "OL",
    "P", "PRE", "S", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL", "path", "svg",
}  # fmt: skip
ATTRIBUTES = {
    "align", "aria-hidden", "aria-label", "checked", "class", "d", "dir", "disabled", "href", "rel", "role", "scope",
    "start", "style", "tabindex", "target", "title", "type", "viewBox",
}  # fmt: skip
MATHML = re.compile(r"^(math|semantics|annotation|m[a-z]+)$")

INVENTORY = """() => [...document.querySelectorAll('.assistant .body *')].map((element) => ({
  name: element.nodeName, inMath: !!element.closest('.katex'), attributes: element.getAttributeNames(),
  href: element.getAttribute('href')}))"""


def test_markdown_code_and_math_are_shown(page: Page, site: SiteProcess) -> None:
    ask(page, "rich")
    wait_for_end(page)
    body = answer(page).locator(".body")
    expect(body.locator("h3")).to_have_text("Umbels")
    expect(body.locator("p strong")).to_have_text("bold")
    expect(body.locator("p em")).to_have_text("slanted")
    expect(body.locator("p s")).to_have_text("struck")
    expect(body.locator("ul > li > ol > li")).to_have_count(2)
    expect(body.locator("li.task input:checked")).to_have_count(1)
    expect(body.locator("blockquote")).to_contain_text("A quote")
    expect(body.locator("td.align-right").first).to_have_text("20")
    expect(body.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(body.locator(".katex")).to_have_count(2)
    expect(body.locator(".katex-display")).to_have_count(1)
    expect(body.locator(".math code")).to_have_text("\\frac{1")
    expect(body).to_contain_text("costs $5 or $6")
    links = {link["href"] for link in page.evaluate(INVENTORY) if link["href"]}
    assert links == {
        "https://example.org/a?b=c&d",
        "https://example.org",
        "https://pictures.example.org/carrot.png",
    }
    assert page.evaluate("document.querySelectorAll('.assistant img').length") == 0
    page.evaluate("document.fonts.ready.then(() => null)")
    assert page.evaluate("[...document.fonts].filter((font) => font.status === 'loaded').length") > 1


def test_a_right_to_left_answer_keeps_code_and_formulas_left_to_right(page: Page) -> None:
    ask(page, "arabic")
    wait_for_end(page)
    body = answer(page).locator(".body")
    assert body.evaluate("element => getComputedStyle(element).direction") == "rtl"
    for part in ("pre", "code", ".math"):
        assert body.locator(part).first.evaluate("element => getComputedStyle(element).direction") == "ltr"


def test_nothing_in_an_answer_runs_or_reaches_out(page: Page, site: SiteProcess) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, "hostile")
    wait_for_end(page)
    expect(answer(page)).to_contain_text("still here")
    expect(answer(page).locator("pre .hljs-tag").first).to_be_visible()  # what is loaded late is there, too
    assert page.evaluate("window.hit") is None
    for link in answer(page).locator(".body a").all():
        link.hover()
        link.focus()
    assert page.evaluate("window.hit") is None
    assert page.url.partition("#")[0].rstrip("/") == site.url
    assert {urlsplit(url).netloc for url in asked} <= {urlsplit(site.url).netloc}
    for found in page.evaluate(INVENTORY):
        is_math = found["inMath"] and (MATHML.match(found["name"]) or found["name"] in ("SPAN", "svg", "path"))
        assert is_math or found["name"] in ELEMENTS, found
        if not found["inMath"]:
            assert set(found["attributes"]) <= ATTRIBUTES - {"style"}, found
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "action") for name in found["attributes"])
        assert found["href"] is None or urlsplit(found["href"]).scheme in ("http", "https", "mailto"), found
    assert len(VECTORS) > 40


def test_finished_blocks_keep_their_elements_and_a_selection_in_them(page: Page) -> None:
    ask(page, "rich")
    expect(answer(page).locator("blockquote")).to_be_visible()
    page.evaluate(
        """() => {
          const heading = document.querySelector('.assistant .body h3');
          window.kept = [...document.querySelectorAll('.assistant .body > *')].slice(0, 2);
          getSelection().selectAllChildren(heading);
        }"""
    )
    wait_for_end(page)
    assert page.evaluate("kept.every((element) => element.isConnected)")
    assert page.evaluate("String(getSelection())") == "Umbels"
