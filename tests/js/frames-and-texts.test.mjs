import assert from 'node:assert/strict';
import { test } from 'node:test';
import { backoffMs, byteLength, generateFrame, openFrame, parseFrame, reconnectsAfter } from '../../static/js/frames.js';
import { contextText, errorText, modelText, outcomeText, shortNumber, shortTime } from '../../static/js/texts.js';

test('frames are those of protocol 3', () => {
  assert.deepEqual(JSON.parse(openFrame('m')), { type: 'open', protocol: 3, model: 'm' });
  assert.deepEqual(JSON.parse(openFrame(null)), { type: 'open', protocol: 3 });
  assert.deepEqual(JSON.parse(generateFrame('g', [])), { type: 'generate', id: 'g', messages: [], params: {} });
});

test('what is no event is dropped', () => {
  for (const data of ['', 'x', '1', 'null', '[]', '{}', '{"type":1}', new ArrayBuffer(2)]) assert.equal(parseFrame(data), null);
  assert.deepEqual(parseFrame('{"type":"pong"}'), { type: 'pong' });
});

test('waits double up to half a minute, and half of each is chance', () => {
  assert.deepEqual([0, 1, 2, 20].map((attempt) => backoffMs(attempt, 1)), [1000, 2000, 4000, 30000]);
  assert.deepEqual([0, 20].map((attempt) => backoffMs(attempt, 0)), [500, 15000]);
});

test('a restart is connected to again, a refusal is not', () => {
  assert.deepEqual([1006, 1012, 1001].map(reconnectsAfter), [true, true, true]);
  assert.deepEqual([1000, 1008, 1009, 4403, 4408].map(reconnectsAfter), [false, false, false, false, false]);
});

test('lengths are in bytes', () => assert.equal(byteLength('aé🌼'), 7));

test('errors are told in plain words', () => {
  assert.match(errorText({ code: 'missing_blocks' }), /offline/);
  assert.match(errorText({ code: 'internal_error', request_id: 'r1' }), /r1/);
  assert.match(errorText({ code: 'new_code', message: 'so it is' }), /so it is/);
  assert.match(errorText({ code: 'new_code' }), /wrong/);
  assert.match(errorText({ code: 'constructor' , message: 'm' }), /m/);
});

test('speeds, times and lengths are short', () => {
  assert.deepEqual([0.42, 12.34, 1234.5].map(shortNumber), ['0.4', '12.3', '1,235']);
  assert.deepEqual([0.0004, 0.035, 0.42, 130].map(shortTime), ['1 ms', '35 ms', '0.4 s', '130 s']);
  const usage = { completion_tokens: 1 };
  assert.equal(outcomeText({ finish_reason: 'stop', usage, timings: { ttft_s: 0.4, tokens_per_s: 12.34 } }), '12.3 tokens/s · first token after 0.4 s');
  assert.equal(outcomeText({ finish_reason: 'cancelled', usage, timings: { ttft_s: null, tokens_per_s: null } }), '1 token · stopped');
  assert.equal(outcomeText({ finish_reason: 'cancelled' }), 'stopped');
  assert.equal(contextText({ used: 312, max: 2048 }), '312 of 2,048 tokens');
  assert.equal(modelText('org/name'), 'name');
});
