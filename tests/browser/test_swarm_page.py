"""The status page in Chromium: with and without scripts, in both themes, on a phone, and while the swarm changes."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.app.site_process import SiteProcess, running_site
from tests.browser.conftest import WATCH_POLICY
from tests.browser.swarm_states import SETTINGS, set_swarm
from tests.browser.test_accessibility import serious

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """A site that knows how to change its swarm."""
    with running_site(settings=SETTINGS) as process:
        yield process


@pytest.fixture
def swarm_page(context: BrowserContext, site: SiteProcess) -> Iterator[Page]:
    """The page of a complete swarm; afterwards: no violation of its policy, and no error."""
    set_swarm(site, "complete")
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{site.url}/swarm")
    expect(page.locator("#theme")).to_be_visible()  # the script is at work
    yield page
    assert page.evaluate("violations") == []
    assert problems == []


@pytest.mark.parametrize(
    ("name", "schemes"), [("complete", ["dark"]), ("degraded", ["light"]), ("incomplete", ["light", "dark"])]
)
def test_no_state_has_a_serious_fault_of_access_or_is_wider_than_a_phone(
    swarm_page: Page, site: SiteProcess, name: str, schemes: list[str]
) -> None:
    set_swarm(site, name)
    swarm_page.reload()
    for scheme in schemes:
        swarm_page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        assert serious(swarm_page) == [], scheme
    swarm_page.set_viewport_size({"width": 360, "height": 640})
    assert swarm_page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_change_of_the_swarm_is_taken_over_and_read_out(swarm_page: Page, site: SiteProcess) -> None:
    expect(swarm_page.locator("#overall")).to_have_text("You can chat now.")
    expect(swarm_page.locator("#overall")).to_have_attribute("aria-live", "polite")
    swarm_page.get_by_role("button", name="Tokens/s").click()
    swarm_page.get_by_role("heading", name="Nodes").click()  # takes the focus out of the table
    swarm_page.evaluate("document.activeElement.blur()")
    set_swarm(site, "incomplete")
    expect(swarm_page.locator("#overall")).to_have_text("Nobody can chat now.", timeout=30_000)
    expect(swarm_page.locator(".says")).to_have_text("No answers now: nobody has blocks 20–27.")
    expect(swarm_page.locator("thead th[aria-sort]")).to_have_text("Tokens/s")
    speeds = swarm_page.locator("tbody td[data-label='Tokens/s']").all_inner_texts()
    assert speeds == sorted(speeds, key=float)


def test_tables_are_sorted_by_their_columns(swarm_page: Page) -> None:
    def column(label: str) -> list[str]:
        return swarm_page.locator(f"tbody td[data-label='{label}']").all_inner_texts()

    swarm_page.get_by_role("button", name="Round trip").click()
    assert column("Round trip") == ["12 ms", "21 ms", "34 ms", "48 ms", "90 ms", "0.2 s", "0.3 s"]
    swarm_page.get_by_role("button", name="Round trip").press("Enter")
    assert column("Round trip")[0] == "0.3 s"
    expect(swarm_page.get_by_role("columnheader", name="Round trip")).to_have_attribute("aria-sort", "descending")
    swarm_page.get_by_role("button", name="State").click()
    assert column("State")[0] == "joining"


def test_the_command_is_copied(swarm_page: Page, site: SiteProcess) -> None:
    swarm_page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    swarm_page.get_by_text("Join with your machine").click()
    swarm_page.get_by_role("button", name="Copy command").click()
    expect(swarm_page.get_by_role("status")).to_have_text("Copied")
    copied = swarm_page.evaluate("navigator.clipboard.readText()")
    assert copied == f"umbel-node run umbel/fake-1b --initial-peers {SETTINGS['initial_peers'][0]}"


def test_the_theme_is_the_one_chosen_on_the_chat_page(swarm_page: Page) -> None:
    swarm_page.get_by_role("button", name="Change to dark colours").click()
    dark = swarm_page.evaluate("getComputedStyle(document.body).backgroundColor")
    swarm_page.reload()
    expect(swarm_page.locator("html")).to_have_attribute("data-theme", "dark")
    assert swarm_page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_the_chat_page_leads_here_in_its_language(page: Page) -> None:
    page.locator("#settings-open").click()
    page.locator("#language").select_option("fr")
    page.get_by_role("link", name="Comment va l’essaim").click()
    expect(page.locator("html")).to_have_attribute("lang", "fr")
    expect(page.get_by_role("heading", level=1)).to_have_text("L’essaim")
    page.get_by_role("link", name="العربية").click()
    expect(page.locator("html")).to_have_attribute("dir", "rtl")
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_all_is_there(browser: Browser, site: SiteProcess) -> None:
    set_swarm(site, "incomplete")
    with browser.new_context(java_script_enabled=False, viewport={"width": 1000, "height": 900}) as context:
        context.add_init_script(WATCH_POLICY)
        page = context.new_page()
        page.goto(f"{site.url}/swarm")
        expect(page.locator("#overall")).to_have_text("Nobody can chat now.")
        expect(page.locator(".need")).to_contain_text("about 6 GB of free memory")
        expect(page.locator(".command code")).to_be_visible()
        expect(page.get_by_role("img", name="With nobody: blocks 20–27.")).to_be_visible()
        expect(page.locator(".nodes").get_by_role("row")).to_have_count(5)
        assert page.locator(".cell.none").count() == 8
        expect(page.get_by_role("img", name="24 hours")).to_be_visible()
        expect(page.get_by_text("6 hours, goes on")).to_be_visible()
        expect(page.get_by_role("button")).to_have_count(0)  # nothing that would not work
