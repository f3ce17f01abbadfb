import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  ask, askAgain, canContinue, contextUse, continueAnswer, edit, emptyConversation, fail, interrupt, isGenerating, receive, toSend,
} from '../../static/js/conversation.js';
import { switchVersion } from '../../static/js/tree.js';

const delta = (seq, text, id = 'g') => ({ type: 'delta', id, seq, text, tokens: 1 });
const done = (reason = 'stop', id = 'g') => ({
  type: 'done', id, finish_reason: reason,
  usage: { prompt_tokens: 5, completion_tokens: 3, cached_tokens: 0 }, timings: { ttft_s: 0.2, tokens_per_s: 4 },
});
const after = (...events) => events.reduce(receive, ask(emptyConversation(), 'hi', 'g'));

test('an answer grows by deltas and ends with done', () => {
  const conversation = after({ type: 'started', id: 'g' }, delta(0, 'a'), delta(1, 'b'), done());
  const last = conversation.messages.at(-1);
  assert.equal(last.content, 'ab');
  assert.equal(last.state, 'final');
  assert.equal(last.numTokens, 2);
  assert.equal(isGenerating(conversation), false);
  assert.deepEqual(contextUse(conversation, 100), { used: 8, max: 100 });
});

test('the whole conversation is sent, without the answer that is awaited', () => {
  const first = after(delta(0, 'a'), done());
  assert.deepEqual(toSend(ask(first, 'more', 'h')), [
    { role: 'user', content: 'hi' }, { role: 'assistant', content: 'a' }, { role: 'user', content: 'more' },
  ]);
});

test('a stopped answer stays part of what was said', () => {
  const stopped = after(delta(0, 'a'), done('cancelled'));
  assert.equal(stopped.messages.at(-1).state, 'stopped');
  assert.deepEqual(toSend(ask(stopped, 'more', 'h')).map(({ content }) => content), ['hi', 'a', 'more']);
});

test('an answer stopped before its first word is not sent', () => {
  assert.deepEqual(toSend(ask(after(done('cancelled')), 'more', 'h')).map(({ role }) => role), ['user', 'user']);
});

test('a failed answer is shown, and thrown away when asked again', () => {
  const failed = receive(after(delta(0, 'a')), { type: 'error', id: 'g', code: 'stream_lost' });
  assert.equal(failed.messages.at(-1).state, 'failed');
  assert.equal(failed.messages.at(-1).content, 'a');
  const again = askAgain(failed, 'h');
  assert.deepEqual(toSend(again), [{ role: 'user', content: 'hi' }]);
  assert.equal(again.messages.length, 2);
  assert.notEqual(again.messages.at(-1).key, failed.messages.at(-1).key);
});

test('an error of no generation ends the one that runs', () => {
  assert.equal(isGenerating(receive(after(), { type: 'error', id: null, code: 'draining' })), false);
});

test('events of other generations, repeated ones and unknown ones change nothing', () => {
  const conversation = after(delta(0, 'a'));
  for (const event of [delta(1, 'x', 'other'), done('stop', 'other'), delta(0, 'a'), { type: 'route_changed', id: 'g' }, { type: 'waiting', id: 'other' }]) {
    assert.equal(receive(conversation, event), conversation);
  }
  const ended = receive(conversation, done());
  assert.equal(receive(ended, delta(1, 'late')), ended);
  assert.equal(fail(ended), ended);
});

test('earlier states are never changed', () => {
  const first = ask(emptyConversation(), 'hi', 'g');
  const copy = structuredClone(first);
  receive(receive(first, delta(0, 'a')), done());
  assert.deepEqual(first, copy);
});

const wait = (cause, left = 30) => ({ type: 'waiting', id: 'g', cause, blocks: ['12:16'], left_s: left });
const recovered = { type: 'recovered', id: 'g', stall_s: 1.5, tokens: 40 };
const last = (conversation) => conversation.messages.at(-1);

test('a wait is shown until text comes', () => {
  const waiting = after(delta(0, 'a'), wait('looking'), wait('missing_blocks', 29.4));
  assert.deepEqual(last(waiting).notice, { kind: 'waiting', cause: 'missing_blocks', blocks: ['12:16'], leftS: 29.4 });
  assert.equal(last(waiting).content, 'a');
  assert.equal(last(receive(waiting, delta(1, 'b'))).notice, null);
  assert.equal(last(after(wait('no_answer', null))).notice.leftS, null);
});

test('that it goes on is shown for some pieces, and a note of it stays', () => {
  let conversation = after(delta(0, 'a'), wait('looking'), recovered);
  for (let seq = 1; seq < 21; seq += 1) {
    assert.equal(last(conversation).notice.kind, 'recovered');
    conversation = receive(conversation, delta(seq, 'b'));
  }
  conversation = receive(conversation, delta(21, 'c'));
  assert.equal(last(conversation).notice, null);
  conversation = receive(conversation, { ...done(), times: { tokens: 22 } });
  assert.equal(last(conversation).numRecoveries, 1);
  assert.equal(last(conversation).stallS, 1.5);
  assert.deepEqual(last(conversation).outcome.times, { tokens: 22 });
});

test('an end and an error take the notice away and keep the text', () => {
  for (const event of [done('cancelled'), { type: 'error', id: 'g', code: 'missing_blocks' }]) {
    const ended = receive(after(delta(0, 'a'), wait('missing_blocks')), event);
    assert.equal(last(ended).notice, null);
    assert.equal(last(ended).content, 'a');
  }
});

const said = (conversation) => toSend(conversation).map(({ content }) => content);

test('another answer is a version beside the first, and what came behind that stays there', () => {
  const two = receive(receive(ask(after(delta(0, 'a'), done()), 'more', 'h'), delta(0, 'b', 'h')), done('stop', 'h'));
  const again = askAgain(two, 'i', 2);
  assert.deepEqual(said(again), ['hi']);
  const other = receive(receive(again, delta(0, 'A', 'i')), done('stop', 'i'));
  assert.deepEqual(said(other), ['hi', 'A']);
  assert.deepEqual(said(switchVersion(other, 5, -1)), ['hi', 'a', 'more', 'b']);
});

test('an edited message starts another branch', () => {
  const edited = edit(after(delta(0, 'a'), done()), 1, 'ho', 'h');
  assert.deepEqual(said(edited), ['ho']);
  assert.deepEqual(said(switchVersion(edited, 3, -1)), ['hi', 'a']);
  assert.equal(receive(edited, delta(0, 'b', 'h')).messages.at(-1).parent, 3);
});

test('text goes to the answer that it belongs to, whatever is shown', () => {
  const again = switchVersion(askAgain(after(delta(0, 'a'), done()), 'h'), 3, -1);
  const grown = receive(again, delta(0, 'b', 'h'));
  assert.deepEqual(said(grown), ['hi', 'a']);
  assert.deepEqual(said(switchVersion(grown, 2, 1)), ['hi', 'b']);
});

test('a place in the queue and a long prefill are told until text comes', () => {
  const stage = (...events) => last(after(...events)).stage;
  const progress = (done, total) => ({ type: 'progress', id: 'g', prefill_done: done, prefill_total: total });
  assert.deepEqual(stage({ type: 'started', id: 'g', seq: 0, queue_position: 2 }), { kind: 'queued', position: 2 });
  assert.deepEqual(stage({ type: 'queued', id: 'g', seq: 1, position: 1 }), { kind: 'queued', position: 1 });
  assert.equal(stage({ type: 'queued', id: 'g', seq: 1, position: 1 }, { type: 'queued', id: 'g', seq: 2, position: 0 }), null);
  assert.deepEqual(stage(progress(512, 2048)), { kind: 'prefill', done: 512, total: 2048 });
  assert.equal(stage(progress(0, 24)), null);
  assert.equal(stage(progress(512, 2048), delta(3, 'a')), null);
});

test('frames of any kind are numbered, and repeated ones change nothing', () => {
  const conversation = after({ type: 'started', id: 'g', seq: 0, queue_position: 0 }, delta(1, 'a'), { ...recovered, seq: 2 });
  assert.equal(conversation.expectedSeq, 3);
  assert.equal(receive(conversation, { ...recovered, seq: 2 }), conversation);
});

test('a cut answer is continued where it ended', () => {
  const cut = after(delta(0, 'a'), done('length'));
  assert.equal(canContinue(last(cut)), true);
  const open = continueAnswer(cut, 'h');
  assert.deepEqual(said(open), ['hi', 'a']);
  const whole = receive(receive(open, delta(0, 'b', 'h')), done('stop', 'h'));
  assert.deepEqual(said(whole), ['hi', 'ab']);
  assert.deepEqual([last(whole), last(after(done('length'))), cut.messages[0]].map(canContinue), [false, false, false]);
});

test('a lost connection is told until it is found again or ends', () => {
  const lost = interrupt(after(delta(0, 'a')), true);
  assert.equal(last(lost).notice.kind, 'reconnecting');
  assert.equal(last(interrupt(lost, false)).notice, null);
  assert.equal(last(receive(lost, delta(1, 'b'))).notice, null);
  assert.equal(last(fail(lost)).notice, null);
  const ended = after(done());
  assert.equal(interrupt(ended, true), ended);
});
