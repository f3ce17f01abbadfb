"""What a long answer costs the page: with every token only its end is made again, however long it is."""

import pytest
from playwright.sync_api import Page

from tests.app.markdown_answers import huge

pytestmark = pytest.mark.browser

# The view alone, outside any conversation, given the text piece by piece; counts what each piece made anew.
STREAM = """async ([text, step]) => {
  const { AnswerView } = await import(document.querySelector('link[href$="js/answer.js"]').href);
  const element = document.createElement('div');
  const view = new AnswerView(element, (language, code) => {
    const pre = document.createElement('pre');
    pre.append(code);
    return pre;
  });
  let added = 0;
  const count = (node) => 1 + [...node.childNodes].reduce((sum, child) => sum + count(child), 0);
  const watch = new MutationObserver(() => {});
  watch.observe(element, { childList: true, attributes: true, subtree: true });
  const found = { pieces: 0, blocks: 0, parts: 0, added: 0, attributes: 0 };
  for (let length = step; length < text.length; length += step) {
    view.update(text.slice(0, length), false);
    const records = watch.takeRecords();
    const nodes = records.flatMap((record) => [...record.addedNodes]);
    found.attributes += records.filter(({ type, target }) => type === 'attributes' && target === element).length;
    found.pieces += 1;
    found.blocks = Math.max(found.blocks, view.numTouched);
    found.parts = Math.max(found.parts, view.numPartsTouched);
    found.added += nodes.reduce((sum, node) => sum + count(node), 0);
  }
  view.update(text, true);
  found.all = count(element);
  return found;
}"""


@pytest.mark.parametrize("kind", ["mixed", "list", "code", "table", "paragraph"])
def test_a_piece_of_an_answer_makes_only_its_end_anew(page: Page, kind: str) -> None:
    found = page.evaluate(STREAM, [huge(kind, 150), 16])
    assert found["pieces"] > 200
    assert found["blocks"] <= 3
    assert found["parts"] <= 12
    assert found["attributes"] <= 2  # each would make the style of the whole answer be worked out again
    assert found["added"] < 40 * found["pieces"], found
