import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ask, askAgain, contextUse, emptyConversation, fail, isGenerating, receive, toSend } from '../../static/js/conversation.js';

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
  for (const event of [delta(1, 'x', 'other'), done('stop', 'other'), delta(0, 'a'), { type: 'route_changed', id: 'g' }]) {
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
