import assert from 'node:assert/strict';
import { test } from 'node:test';
import { toBlocks } from '../../static/js/blocks.js';

const paragraph = (text) => ({ kind: 'paragraph', text });
const code = (language, text, isOpen = false) => ({ kind: 'code', language, text, isOpen });

const CASES = [
  ['nothing', '', []],
  ['one line', 'a', [paragraph('a')]],
  ['lines of one paragraph', 'a\nb', [paragraph('a\nb')]],
  ['paragraphs', 'a\n\n\nb\r\n\r\nc', [paragraph('a'), paragraph('b'), paragraph('c')]],
  ['code', 'a\n```python\nx = 1\n\ny\n```\nb', [paragraph('a'), code('python', 'x = 1\n\ny'), paragraph('b')]],
  ['code without a language', '```\nx\n```', [code('', 'x')]],
  ['tildes', '~~~js\n```\n~~~', [code('js', '```')]],
  ['a longer fence closes', '```\nx\n````', [code('', 'x')]],
  ['a shorter fence does not', '````\n```\n````', [code('', '```')]],
  ['code that still streams', 'a\n```js\nlet', [paragraph('a'), code('js', 'let', true)]],
  ['an odd language', '```<img src=x>\nx\n```', [code('', 'x')]],
  ['backticks in a line', 'a ```b``` c', [paragraph('a ```b``` c')]],
  ['markup stays text', '<b onclick=x>hi</b>', [paragraph('<b onclick=x>hi</b>')]],
];

for (const [name, text, blocks] of CASES) test(name, () => assert.deepEqual(toBlocks(text), blocks));

test('blocks in front of the last one stay when text is added', () => {
  const text = 'a\n\nb\n```js\nx\n\ny\n```\n\nc\n~~~\nz';
  for (let length = 0; length < text.length; length += 1) {
    const before = toBlocks(text.slice(0, length)).slice(0, -2);
    assert.deepEqual(toBlocks(text).slice(0, before.length), before);
  }
});
