/** Pure: the conversation as data, and what each event of the site does to it. */

import { add, find, path, remove, replace } from './tree.js';

/**
 * @typedef {{finish_reason: string, usage: object, timings: {ttft_s: number|null, tokens_per_s: number|null},
 *            times?: object|null}} Outcome
 * @typedef {{kind: 'waiting', cause: string, blocks: string[], leftS: number|null} | {kind: 'recovered', untilSeq: number} | {kind: 'reconnecting'}} Notice
 * @typedef {{kind: 'queued', position: number} | {kind: 'prefill', done: number, total: number}} Stage before the first token
 * @typedef {{key: number, parent: number, role: 'user'|'assistant', content: string,
 *            state: 'final'|'waiting'|'streaming'|'stopped'|'failed', stage: Stage|null, numTokens: number, outcome: Outcome|null,
 *            notice: Notice|null, route: {blocks: string, peer: string}[]|null, numRecoveries: number, stallS: number}} Message
 * @typedef {{messages: Message[], chosen: Record<number, number>, nextKey: number, generationId: string|null, answerKey: number,
 *            expectedSeq: number}} Conversation
 */

/** @returns {Conversation} */
export function emptyConversation() {
  return { messages: [], chosen: {}, nextKey: 1, generationId: null, answerKey: 0, expectedSeq: 0 };
}

const LONG_PREFILL = 200; // tokens; what is read sooner need not be told
const RECOVERED_PIECES = 20; // for so many pieces a page says that the answer goes on

export function isGenerating(conversation) {
  return conversation.generationId !== null;
}

function message(role, content, state) {
  return { role, content, state, stage: null, numTokens: 0, outcome: null, notice: null, route: null, numRecoveries: 0, stallS: 0 };
}

/** Return the message that is shown last, or undefined. */
export function lastShown(conversation) {
  return path(conversation).at(-1);
}

/** Return the conversation with the user's text and an answer that waits for its first token. */
export function ask(conversation, content, generationId) {
  return askBehind(conversation, lastShown(conversation)?.key ?? 0, content, generationId);
}

/** Return the conversation with another version of a user's message, and an answer to that. */
export function edit(conversation, key, content, generationId) {
  return askBehind(conversation, find(conversation, key).parent, content, generationId);
}

function askBehind(conversation, parent, content, generationId) {
  const asked = add(conversation, parent, message('user', content, 'final'));
  return waitForAnswer(asked, asked.nextKey - 1, generationId);
}

/**
 * Return the conversation with another version of an answer asked for: of the one with `key`, else of the last that is shown.
 * One that failed makes room for it.
 */
export function askAgain(conversation, generationId, key = lastShown(conversation).key) {
  const old = find(conversation, key);
  if (old.role !== 'assistant') return waitForAnswer(conversation, key, generationId);
  const isLeaf = !conversation.messages.some(({ parent }) => parent === key);
  const rest = old.state === 'failed' && isLeaf ? remove(conversation, key) : conversation;
  return waitForAnswer(rest, old.parent, generationId);
}

function waitForAnswer(conversation, parent, generationId) {
  const waiting = add(conversation, parent, message('assistant', '', 'waiting'));
  return { ...waiting, generationId, answerKey: waiting.nextKey - 1, expectedSeq: 0 };
}

/** Whether more of an answer can be asked for: it has text, and was cut off, stopped or broken off. */
export function canContinue({ role, content, state, outcome }) {
  const isCut = state === 'stopped' || state === 'failed' || outcome?.finish_reason === 'length';
  return role === 'assistant' && content !== '' && isCut;
}

/** Return the conversation with more of its last answer asked for. */
export function continueAnswer(conversation, generationId) {
  const { key } = lastShown(conversation);
  const open = replace(conversation, key, { state: 'streaming', stage: null, notice: null, outcome: null });
  return { ...open, generationId, answerKey: key, expectedSeq: 0 };
}

/** Return the conversation with its connection lost (`isLost`) or found again; the answer is still awaited. */
export function interrupt(conversation, isLost) {
  return isGenerating(conversation) ? withAnswer(conversation, { notice: isLost ? { kind: 'reconnecting' } : null }) : conversation;
}

/** Return what to send: the system prompt and every message shown that has content; an answer that was cut off stays part of what was said. */
export function toSend(conversation) {
  const said = path(conversation)
    .filter(({ role, content, state }) => state !== 'waiting' && (role === 'user' || content !== ''))
    .map(({ role, content }) => ({ role, content }));
  return conversation.system?.trim() ? [{ role: 'system', content: conversation.system }, ...said] : said;
}

function withAnswer(conversation, change, rest = {}) {
  return { ...replace(conversation, conversation.answerKey, change), ...rest };
}

/**
 * Return the conversation after an event of the site. Events of a generation that is over change nothing, and neither
 * do those that come a second time after a resume, nor kinds that a later version may send.
 */
export function receive(conversation, event) {
  if (!isGenerating(conversation)) return conversation;
  if (event.id !== conversation.generationId && !(event.type === 'error' && event.id == null)) return conversation;
  if (event.seq < conversation.expectedSeq) return conversation;
  const next = apply(conversation, event, find(conversation, conversation.answerKey));
  return Number.isInteger(event.seq) ? { ...next, expectedSeq: event.seq + 1 } : next;
}

function apply(conversation, event, answer) {
  switch (event.type) {
    case 'started':
      return event.queue_position ? withAnswer(conversation, { stage: { kind: 'queued', position: event.queue_position } }) : conversation;
    case 'queued':
      return withAnswer(conversation, { stage: event.position ? { kind: 'queued', position: event.position } : null });
    case 'progress':
      if (event.prefill_total < LONG_PREFILL) return conversation;
      return withAnswer(conversation, { stage: { kind: 'prefill', done: event.prefill_done, total: event.prefill_total } });
    case 'delta':
      return withAnswer(conversation, {
        content: answer.content + event.text,
        state: 'streaming',
        stage: null,
        numTokens: answer.numTokens + (event.tokens ?? 0),
        notice: answer.notice?.kind === 'recovered' && event.seq < answer.notice.untilSeq ? answer.notice : null,
      });
    case 'route_changed':
      return event.route ? withAnswer(conversation, { route: event.route }) : conversation;
    case 'waiting': {
      const { cause, blocks, left_s: leftS } = event;
      return withAnswer(conversation, { notice: { kind: 'waiting', cause, blocks: blocks ?? [], leftS: leftS ?? null } });
    }
    case 'recovered':
      return withAnswer(conversation, {
        notice: { kind: 'recovered', untilSeq: conversation.expectedSeq + RECOVERED_PIECES },
        numRecoveries: answer.numRecoveries + 1,
        stallS: answer.stallS + (event.stall_s ?? 0),
      });
    case 'done':
      return finish(conversation, event, answer);
    case 'error':
      return fail(conversation);
    default:
      return conversation;
  }
}

function finish(conversation, { finish_reason, usage, timings, times = null, served_by: servedBy }, answer) {
  const state = finish_reason === 'cancelled' ? 'stopped' : 'final';
  const content = answer.content.trimEnd() === '' ? '' : answer.content;
  const route = servedBy?.route ?? answer.route;
  const change = { content, state, stage: null, notice: null, route, outcome: { finish_reason, usage, timings, times } };
  return withAnswer(conversation, change, { generationId: null });
}

/** Return the conversation after its answer ended in an error; what was said of it stays. */
export function fail(conversation) {
  if (!isGenerating(conversation)) return conversation;
  return withAnswer(conversation, { state: 'failed', stage: null, notice: null }, { generationId: null });
}

/** Return how much of the context the conversation uses, as {used, max}, or null before the first answer. */
export function contextUse(conversation, max) {
  const usage = path(conversation).findLast(({ outcome }) => outcome?.usage)?.outcome.usage;
  if (!usage || !max) return null;
  return { used: Math.min(max, usage.prompt_tokens + usage.completion_tokens), max };
}
