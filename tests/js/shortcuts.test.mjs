import assert from 'node:assert/strict';
import { test } from 'node:test';
import { english } from './english.mjs';
import { keyNames, SHORTCUTS, shortcutOf } from '../../static/js/shortcuts.js';

const mod = { ctrlKey: true };
const CASES = [
  [{ key: 'O', shiftKey: true, ...mod }, 'new'],
  [{ key: 'o', shiftKey: true, metaKey: true }, 'new'],
  [{ key: 'o', ...mod }, null],
  [{ key: 'k', ...mod }, 'search'],
  [{ key: 'k' }, null],
  [{ key: 'S', shiftKey: true, ...mod }, 'sidebar'],
  [{ key: 'C', shiftKey: true, ...mod }, 'copy'],
  [{ key: 'c', ...mod }, null],
  [{ key: ':', shiftKey: true, ...mod }, 'copy_code'],
  [{ key: 'ö', code: 'Semicolon', shiftKey: true, ...mod }, 'copy_code'],
  [{ key: '/', ...mod }, 'list'],
  [{ key: '/', shiftKey: true, ...mod }, 'list'],
  [{ key: 'Escape' }, 'stop'],
  [{ key: 'Escape', isComposing: true }, null],
  [{ key: 'Escape', keyCode: 229 }, null],
  [{ key: 'Escape', shiftKey: true }, 'compose'],
  [{ key: 'ArrowUp' }, 'edit'],
  [{ key: 'ArrowUp', shiftKey: true }, null],
  [{ key: 'o', shiftKey: true, altKey: true, ...mod }, null],
  [{ key: 'r', ...mod }, null],
];

for (const [event, name] of CASES) test(`${JSON.stringify(event)} is ${name}`, () => assert.equal(shortcutOf(event), name));

test('every shortcut can be pressed and is told', () => {
  const pressed = new Set(CASES.map(([, name]) => name));
  for (const { name } of SHORTCUTS) {
    assert.ok(pressed.has(name), name);
    assert.ok(english[`shortcut.${name}`], name);
  }
  assert.deepEqual(keyNames(SHORTCUTS[0], true), ['⌘', 'Shift', 'O']);
  assert.deepEqual(keyNames(SHORTCUTS[0], false), ['Ctrl', 'Shift', 'O']);
});
