import assert from 'node:assert/strict';
import { test } from 'node:test';
import './english.mjs';
import { backoffMs, byteLength, generateFrame, openFrame, parseFrame, reconnectsAfter, resumeFrame } from '../../static/js/frames.js';
import {
  blocksText, contextText, errorText, hopRows, modelText, noticeText, noticeTimeText, outcomeText, recoveredText, shortNumber,
  shortTime, timesRows,
} from '../../static/js/texts.js';

test('frames are those of protocol 3', () => {
  assert.deepEqual(JSON.parse(openFrame('m')), { type: 'open', protocol: 3, resume: true, model: 'm' });
  assert.deepEqual(JSON.parse(openFrame(null)), { type: 'open', protocol: 3, resume: true });
  assert.deepEqual(JSON.parse(resumeFrame('t', { id: 'g', fromSeq: 4 })), { type: 'resume', token: 't', id: 'g', from_seq: 4 });
  const asked = { type: 'generate', id: 'g', messages: [], params: {}, times: true };
  assert.deepEqual(JSON.parse(generateFrame('g', [])), asked);
  assert.deepEqual(JSON.parse(generateFrame('g', [], {}, true)), { ...asked, continue: true });
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
  assert.deepEqual([1000, 1008, 1009, 4403, 4408, 4409].map(reconnectsAfter), Array(6).fill(false));
});

test('lengths are in bytes', () => assert.equal(byteLength('aé🌼'), 7));

test('errors are told in plain words', () => {
  assert.match(errorText({ code: 'missing_blocks' }), /offline/);
  assert.match(errorText({ code: 'missing_blocks', blocks: ['12:16'] }), /offline right now: blocks 12–15/);
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

test('blocks are named inclusively', () => {
  assert.equal(blocksText(['12:16']), 'blocks 12–15');
  assert.equal(blocksText(['3:4', '6:8']), 'block 3, blocks 6–7');
  assert.equal(blocksText([]), 'some blocks');
});

const waiting = (cause, blocks = ['12:16'], leftS = 28.6) => ({ kind: 'waiting', cause, blocks, leftS });

test('what happens to an answer is told in plain words, and the seconds apart from them', () => {
  assert.equal(noticeText(waiting('looking')), 'A volunteer’s machine left; looking for another…');
  assert.equal(noticeText(waiting('missing_blocks')), 'Waiting: blocks 12–15 have no node.');
  assert.equal(noticeText(waiting('missing_blocks', ['3:4'])), 'Waiting: block 3 has no node.');
  assert.match(noticeText(waiting('no_answer')), /silent/);
  assert.match(noticeText(waiting('cache_full')), /no machine can take blocks 12–15/);
  assert.equal(noticeText({ kind: 'recovered', untilSeq: 9 }), 'Going on.');
  assert.equal(noticeTimeText(waiting('missing_blocks')), '29 s left');
  assert.equal(noticeTimeText(waiting('missing_blocks', ['3:4'], 0.2)), '1 s left');
  for (const notice of [waiting('looking'), waiting('no_answer', ['3:4'], null), { kind: 'recovered', untilSeq: 9 }]) {
    assert.equal(noticeTimeText(notice), '');
  }
});

test('a note stays with an answer that lost machines', () => {
  assert.equal(recoveredText({ numRecoveries: 0, stallS: 0 }), '');
  assert.equal(recoveredText({ numRecoveries: 1, stallS: 1.54 }), 'went on after a machine was missing, 1.5 s lost');
  assert.match(recoveredText({ numRecoveries: 3, stallS: 5 }), /3 times/);
});

test('the table of times leaves out what took none', () => {
  const shares = (compute, stall) => ({ queue_s: 0, compute_s: compute, wire_s: 0.02, client_s: 0, stall_s: stall, total_s: compute + stall + 0.02 });
  const times = { first_token: shares(0.5, 0), per_token: shares(0.05, 0), total: shares(2, 1.5), hops: [
    { blocks: '0:12', peer: '…Zb3rYm', per_token: { compute_s: 0.05, wire_s: 0 } },
  ] };
  assert.deepEqual(timesRows(times), [
    ['Computing', '0.5 s', '50 ms', '2.0 s'], ['Network', '20 ms', '20 ms', '20 ms'], ['Lost machines', '–', '–', '1.5 s'],
    ['All', '0.5 s', '70 ms', '3.5 s'],
  ]);
  assert.deepEqual(hopRows(times), [['blocks 0–11 · \u2066…Zb3rYm\u2069', '50 ms', '–']]);
});
