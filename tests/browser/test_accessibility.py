"""axe-core finds nothing serious on the page, with an answer that has all that a page can render, in both themes."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.browser.test_chat_page import ask, wait_for_end

pytestmark = pytest.mark.browser

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


def serious(page: Page) -> list[str]:
    """Return what axe finds, each with the elements that it is about."""
    response = Axe().run(page, options=RULES).response
    assert "color-contrast" in {each["id"] for each in response["passes"] + response["violations"]}
    return [
        f"{each['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for each in response["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("question", ["rich", "arabic"])
def test_an_answer_has_no_serious_fault_of_access(page: Page, scheme: str, question: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert serious(page) == []
    ask(page, question)
    wait_for_end(page)
    page.locator(".assistant pre .hljs-keyword, .assistant pre .hljs-built_in").first.wait_for()
    page.locator(".assistant .katex").first.wait_for()
    page.locator(".assistant").last.scroll_into_view_if_needed()
    assert serious(page) == []


def test_a_fault_would_be_found(page: Page) -> None:
    page.evaluate(
        """() => {
          const quiet = document.createElement('p');
          quiet.textContent = 'hardly to be seen';
          quiet.style.color = '#eee';
          quiet.style.background = '#fff';
          const button = document.createElement('button');
          document.querySelector('main').append(quiet, button);
        }"""
    )
    assert {fault.split(":")[0] for fault in serious(page)} == {"color-contrast", "button-name"}
