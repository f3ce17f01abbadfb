import assert from 'node:assert/strict';
import { test } from 'node:test';
import { directionOf } from '../../static/js/bidi.js';
import { MarkdownReader, mendEnd, parseBlocks, safeHref } from '../../static/js/markdown.js';

const TEXT = [
  '# Title', '', 'a **bold** word', 'and a line', '', '- one', '- two', '  - inner', '', '- three', '', '    indented', '',
  '```python', 'x = 1', '', 'y', '```', '| a | b |', '|---|---|', '| 1 | 2 |', '', '> quote', 'lazy', '', '$$', 'x^2', '$$', '',
  '1. first', '2. second', '', 'Setext', '---', '~~~', '```', '~~~', 'end',
].join('\n');

const plain = (blocks) => blocks.map(({ source, tokens, isOpen }) => ({ source, isOpen, types: tokens.map(({ type }) => type) }));

test('a text read in pieces is read as it would be at once', () => {
  for (let step = 1; step < 8; step += 1) {
    const reader = new MarkdownReader();
    for (let length = 0; length < TEXT.length; length += step) reader.read(TEXT.slice(0, length), false);
    const bare = plain(reader.read(TEXT, true)).map(({ isOpen, types }) => ({ isOpen, types }));
    assert.deepEqual(bare, plain(parseBlocks(TEXT)).map(({ isOpen, types }) => ({ isOpen, types })), `by ${step}`);
  }
});

test('blocks in front of the last one stay the same objects, and only the tail is parsed', () => {
  const reader = new MarkdownReader();
  let before = [];
  for (let length = 1; length <= TEXT.length; length += 1) {
    const now = reader.read(TEXT.slice(0, length), false);
    const done = before.slice(0, -1);
    assert.ok(done.every((block, index) => block === now[index]), TEXT.slice(0, length));
    before = now;
  }
});

test('a text that is another one is read anew', () => {
  const reader = new MarkdownReader();
  reader.read('a\n\nb\n\nc', false);
  assert.deepEqual(plain(reader.read('x\n\ny', true)), plain(parseBlocks('x\n\ny')));
});

test('links by reference are found when the text is whole', () => {
  const reader = new MarkdownReader();
  reader.read('see [it][1]\n\nmore\n\n[1]: https://example.org', false);
  const [first] = reader.read('see [it][1]\n\nmore\n\n[1]: https://example.org', true);
  assert.equal(first.tokens[1].children[1].type, 'link_open');
});

test('a fence is open until it is closed', () => {
  const isOpen = (text) => parseBlocks(text).at(-1).isOpen;
  assert.deepEqual(['```js', '```js\nx', '```js\nx\n``', '```js\nx\n```', '````\n```', '~~~\nx\n~~~~', 'a'].map(isOpen), [true, true, true, false, true, false, false]);
});

const MENDED = [
  ['plain text', 'plain text'], ['a **bo', 'a **bo**'], ['a **bold** b', 'a **bold** b'], ['a **', 'a '], ['a *sl', 'a *sl*'],
  ['2 * 3 * 4', '2 * 3 * 4'], ['* item\n* **it', '* item\n* **it**'], ['a `co', 'a `co`'], ['a `', 'a '], ['a `b` c', 'a `b` c'],
  ['`**` a', '`**` a'], ['~~gone', '~~gone~~'], ['see [it](https://exa', 'see it'], ['![pic](https://exa', 'pic'],
  ['a [x] b', 'a [x] b'], ['```\na **b', '```\na **b'], ['**x\n\ny', '**x\n\ny'], ['snake_case_name', 'snake_case_name'],
];
for (const [text, mended] of MENDED) test(`the end of ${JSON.stringify(text)} is mended`, () => assert.equal(mendEnd(text), mended));

const mathOf = (text) => parseBlocks(text).flatMap(({ tokens }) => tokens.flatMap((token) => token.children ?? [token])).filter(({ type }) => type.startsWith('math')).map(({ type, content }) => [type, content]);
const FORMULAS = [
  ['$x^2$', [['math_inline', 'x^2']]], ['a \\(x\\) b', [['math_inline', 'x']]], ['$$x$$', [['math_block', 'x']]],
  ['$$\nx\ny\n$$', [['math_block', 'x\ny']]], ['\\[\nx\n\\]', [['math_block', 'x']]], ['a $$x$$ b', [['math_inline', 'x']]],
  ['costs $5 and $6', []], ['$5/$6', []], ['US$ 5 or $ 6', []], ['$5, or $', []], ['\\$x$', []], ['`$x$`', []], ['$2x = 4$', [['math_inline', '2x = 4']]],
  ['$a\\$b$', [['math_inline', 'a\\$b']]], ['$x', []], ['$$x', []], ['    $$x$$', []],
];
for (const [text, found] of FORMULAS) test(`formulas of ${JSON.stringify(text)}`, () => assert.deepEqual(mathOf(text), found));

test('links lead to the web and to mail only', () => {
  const good = ['https://a.example', 'HTTP://a.example', 'mailto:a@b.example'];
  const bad = ['javascript:x', 'data:text/html,x', '//a.example', '/x', 'x', '', null, 'https:x', 'blob:https://a.example/1'];
  assert.deepEqual(good.map(safeHref), good);
  assert.deepEqual(bad.map(safeHref), bad.map(() => null));
});

test('HTML stays text', () => {
  const types = parseBlocks('<b>x</b>\n\n<div>\n\n<!-- c -->').flatMap(({ tokens }) => tokens.flatMap((token) => [token.type, ...(token.children ?? []).map(({ type }) => type)]));
  assert.ok(!types.some((type) => type.startsWith('html')));
});

test('the direction is that of most letters outside code', () => {
  assert.equal(directionOf('שלום hello עולם'), 'rtl');
  assert.equal(directionOf('hello שלום, my friends'), 'ltr');
  assert.equal(directionOf('مرحبا `some_long_name = 1` https://example.org/long/path'), 'rtl');
  assert.equal(directionOf('12 34'), 'auto');
});
