"""The page in the languages that browsers ask for, and in the one that a person chooses."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.app.site_process import SiteProcess
from tests.browser.conftest import WATCH_POLICY
from tests.browser.test_accessibility import serious
from tests.browser.test_chat_page import ask, wait_for_end

pytestmark = pytest.mark.browser

LOCALES = Path(__file__).resolve().parents[2] / "static" / "locales"
TEXTS = {path.stem: json.loads(path.read_text()) for path in LOCALES.glob("*.json")}
WIDTH = "document.documentElement.scrollWidth"


def test_there_are_ten() -> None:
    assert set(TEXTS) == {"ar", "en", "es", "fr", "hi", "id", "pt", "sw", "vi", "zh"}


@pytest.mark.parametrize("width", [320, 1100])
def test_the_page_speaks_what_the_browser_asks_for(browser: Browser, site: SiteProcess, width: int) -> None:
    for locale in ("ar-EG", "es-MX", "fr", "hi", "id", "pt-BR", "sw", "vi", "zh-CN", "xx"):
        name = locale.split("-")[0] if locale != "xx" else "en"
        with browser.new_context(locale=locale, viewport={"width": width, "height": 700}) as context:
            context.add_init_script(WATCH_POLICY)
            page = context.new_page()
            page.goto(site.url)
            field = page.get_by_role("textbox", name=TEXTS[name]["composer.label"], exact=True)
            expect(field).to_have_attribute("placeholder", TEXTS[name]["composer.placeholder"])
            html = page.locator("html")
            expect(html).to_have_attribute("lang", name)
            expect(html).to_have_attribute("dir", "rtl" if name == "ar" else "ltr")
            expect(page.locator("body")).to_contain_text(TEXTS[name]["welcome.question"])
            assert page.evaluate(WIDTH) <= width, locale
            assert page.evaluate("violations") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_right_to_left_has_no_serious_fault_of_access(browser: Browser, site: SiteProcess, scheme: str) -> None:
    with browser.new_context(locale="ar", viewport={"width": 1100, "height": 750}) as context:
        page = context.new_page()
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        page.goto(site.url)
        field = page.get_by_role("textbox", name=TEXTS["ar"]["composer.label"], exact=True)
        field.fill("arabic")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant .katex")).to_be_visible(timeout=20_000)
        assert serious(page) == []
        assert field.bounding_box()["x"] > page.locator("#send, #stop").locator("visible=true").bounding_box()["x"]  # type: ignore[index]


def test_a_chosen_language_stays(page: Page) -> None:
    ask(page, "hi")
    wait_for_end(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Language").select_option("fr")
    page.keyboard.press("Escape")
    expect(page.get_by_placeholder(TEXTS["fr"]["composer.placeholder"])).to_be_visible()
    expect(page.locator(".assistant")).to_contain_text("jetons/s")
    page.reload()
    expect(page.get_by_placeholder(TEXTS["fr"]["composer.placeholder"])).to_be_visible()
