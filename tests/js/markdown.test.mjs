import assert from 'node:assert/strict';
import { test } from 'node:test';
import { directionOf } from '../../static/js/bidi.js';
import { numSame } from '../../static/js/block-parts.js';
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

const line = (number) => `An **umbel** ${number} of \`flowers\` and [a link](https://example.org/${number})`;
const numbers = Array.from({ length: 110 }, (_, number) => number);
const LONG = {
  'tight list': numbers.map((number) => `- ${line(number)}`).join('\n'),
  'loose list': numbers.map((number) => `${number + 1}. ${line(number)}`).join('\n\n'),
  'list that becomes loose': `${numbers.map((number) => `- ${line(number)}`).join('\n')}\n\n- last\n- one`,
  'list with code': numbers.map((number) => `- ${line(number)}\n  \`\`\`js\n  x = ${number} ** 2\n  \`\`\`\n  - inner`).join('\n'),
  'list and another': `${numbers.map((number) => `- ${line(number)}`).join('\n')}\n* other\n\nend`,
  table: `| a | b |\n|:--|--:|\n${numbers.map((number) => `| ${number} | ${line(number)} |`).join('\n')}\n\nend **of** it`,
  'table in the middle': `one\n\ntwo\n\n| a | b |\n|---|---|\n${numbers.map((number) => `| ${number} | ${line(number)} |`).join('\n')}\n\n## end`,
};
const contents = (blocks) => blocks.map(({ source, tokens, parts }) => [
  source.trimEnd(), tokens.map(({ type, content, hidden, tag }) => [type, content, hidden, tag]), parts.map((part) => part.text),
]);
for (const [name, text] of Object.entries(LONG)) {
  test(`a long ${name} is read as it would be at once, from its last parts on`, () => {
    const reader = new MarkdownReader();
    let numLong = 0;
    for (let length = 1; length <= text.length; length += 7) {
      const found = reader.read(text.slice(0, length), false);
      numLong += reader.numParsed > 4500 ? 1 : 0;
      if (length % 32 === 0 || text.length - length < 60) {
        assert.deepEqual(contents(found), contents(parseBlocks(mendEnd(text.slice(0, length)))), text.slice(0, length).slice(-80));
      }
    }
    assert.ok(numLong < 15, `${numLong} times more than the end was parsed`);
    assert.deepEqual(contents(reader.read(text, true)), contents(parseBlocks(text)));
  });
}

test('what a late line changes in early blocks is read right in the end, and the others stay', () => {
  const text = 'before\n\n$$\nx\n\ny\n$$\n\nafter';
  const reader = new MarkdownReader();
  let streamed;
  for (let length = 1; length <= text.length; length += 1) streamed = reader.read(text.slice(0, length), false);
  const whole = reader.read(text, true);
  assert.deepEqual(contents(whole), contents(parseBlocks(text)));
  assert.equal(whole[0], streamed[0]);
});

test('the end of an open paragraph leaves its earlier words the same parts', () => {
  const text = 'A **bold** word, `code` and [a link](https://example.org) and more of it';
  const before = parseBlocks(text)[0].parts;
  const after = parseBlocks(`${text} and *more*`)[0].parts;
  assert.equal(numSame(before, after), before.length - 1);
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
  ['a [x] b', 'a [x] b'], ['```\na **b', '```\na **b'], ['- a\n  ```\n  b **c', '- a\n  ```\n  b **c'], ['> ```\n> x\n> ```\n> **y', '> ```\n> x\n> ```\n> **y**'],
  ['\n**x', '\n**x**'], ['\n', '\n'], ['', ''], ['- **x\n- **y', '- **x\n- **y**'], ['# a **b\nc', '# a **b\nc'], ['- a\n\n1', '- a\n\n'], ['a\n-', 'a\n'], ['2. a\n\n3.', '2. a\n\n'], ['in 1984', 'in 1984'], ['**x\n\ny', '**x\n\ny'], ['snake_case_name', 'snake_case_name'],
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
