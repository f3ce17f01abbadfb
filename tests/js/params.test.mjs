import assert from 'node:assert/strict';
import { test } from 'node:test';
import './english.mjs';
import { fields, readField, toParams } from '../../static/js/params.js';
import { errorText, joinCommand, stageText, stateText } from '../../static/js/texts.js';

const field = (name, limits) => fields(limits).find((one) => one.name === name);

test('values within the limits are read, others are not, and none is the default', () => {
  const cases = [['0.5', 0.5], ['0', 0], ['10', 10], ['10.1', undefined], ['-1', undefined], ['x', undefined], ['', null], [' ', null], [null, null], ['Infinity', undefined]];
  for (const [text, value] of cases) assert.equal(readField(field('temperature'), text), value, text);
  assert.equal(readField(field('top_k'), '1.5'), undefined);
});

test('only what is set and allowed is sent, and no answer is longer than the site allows', () => {
  assert.deepEqual(toParams({ temperature: 0, top_p: null, top_k: 'x', other: 1, max_new_tokens: 500 }), { temperature: 0, max_new_tokens: 500 });
  assert.deepEqual(toParams({ max_new_tokens: 500 }, { max_new_tokens: 100 }), { max_new_tokens: 100 });
});

test('a swarm that lacks blocks is told with their numbers', () => {
  assert.match(stateText({ status: 'incomplete', missing: ['blocks 8–23', 'block 30'] }), /offline: blocks 8–23, block 30\./);
  assert.match(stateText({ status: 'incomplete' }), /some blocks/);
  assert.match(stateText({ status: 'ready' }), /online/);
  assert.match(stateText({ status: 'new state' }), /could not be loaded/);
});

test('what comes before the first token is told', () => {
  assert.equal(stageText({ kind: 'queued', position: 1 }), 'Number 1 in the queue');
  assert.equal(stageText({ kind: 'prefill', done: 512, total: 2048 }), 'Reading the chat: 512 of 2,048 tokens');
  assert.equal(stageText(null), '');
});

test('a limit tells until when', () => {
  assert.match(errorText({ code: 'limit_exceeded', retry_after: 30 }), /in 30.0 s/);
  assert.match(errorText({ code: 'limit_exceeded' }), /later/);
});

test('the command to join is safe to paste', () => {
  assert.equal(joinCommand('org/m-1b', ['/ip4/192.0.2.7/tcp/31337/p2p/12D3']), 'umbel-node run org/m-1b --initial-peers /ip4/192.0.2.7/tcp/31337/p2p/12D3');
  assert.equal(joinCommand("a';b", []), "umbel-node run 'a'\\'';b'");
});
