import assert from 'node:assert/strict';
import { test } from 'node:test';
import { add, find, path, remove, replace, switchVersion, version } from '../../static/js/tree.js';

const EMPTY = { messages: [], chosen: {}, nextKey: 1 };
const grow = (...pairs) => pairs.reduce((tree, [parent, content]) => add(tree, parent, { content }), EMPTY);
const shown = (tree) => path(tree).map(({ content }) => content).join('');
const forked = grow([0, 'a'], [1, 'b'], [2, 'c'], [1, 'B'], [4, 'D']); // a → b → c, and a → B → D

test('what was added last is shown', () => {
  assert.equal(shown(EMPTY), '');
  assert.equal(shown(grow([0, 'a'], [1, 'b'])), 'ab');
  assert.equal(shown(forked), 'aBD');
});

test('another version brings what followed it', () => {
  const other = switchVersion(forked, 4, -1);
  assert.equal(shown(other), 'abc');
  assert.equal(shown(switchVersion(other, 2, 1)), 'aBD');
  assert.equal(switchVersion(other, 2, -1), other);
  assert.equal(switchVersion(forked, 4, 1), forked);
});

test('versions are counted', () => {
  assert.deepEqual(version(forked, find(forked, 4)), { index: 1, count: 2 });
  assert.deepEqual(version(forked, find(forked, 1)), { index: 0, count: 1 });
});

test('branches remember which of their versions was shown', () => {
  const deep = add(switchVersion(forked, 4, -1), 2, { content: 'C' }); // a → b → c or C
  const chosen = switchVersion(deep, 6, -1);
  assert.equal(shown(switchVersion(switchVersion(chosen, 2, 1), 4, -1)), 'abc');
});

test('a message that goes leaves the other versions', () => {
  assert.equal(shown(remove(forked, 5)), 'aB');
  assert.equal(shown(remove(remove(forked, 5), 4)), 'abc');
});

test('the first message may have versions', () => {
  const two = add(forked, 0, { content: 'x' });
  assert.equal(shown(two), 'x');
  assert.equal(shown(switchVersion(two, 6, -1)), 'aBD');
});

test('earlier trees are never changed', () => {
  const copy = structuredClone(forked);
  switchVersion(forked, 4, -1);
  replace(forked, 1, { content: 'z' });
  add(remove(forked, 5), 4, { content: 'y' });
  assert.deepEqual(forked, copy);
  assert.equal(shown(replace(forked, 1, { content: 'z' })), 'zBD');
});

test('a chosen version that is gone does not hide the others', () => {
  assert.equal(shown({ ...forked, chosen: { 1: 99 } }), 'aBD');
});
