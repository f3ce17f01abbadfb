/** Pure: the conversation as data, and what each event of the site does to it. */

/**
 * @typedef {{finish_reason: string, usage: object, timings: {ttft_s: number|null, tokens_per_s: number|null},
 *            times?: object|null}} Outcome
 * @typedef {{kind: 'waiting', cause: string, blocks: string[], leftS: number|null} | {kind: 'recovered', untilSeq: number}} Notice
 * @typedef {{key: number, role: 'user'|'assistant', content: string, state: 'final'|'waiting'|'streaming'|'stopped'|'failed',
 *            numTokens: number, outcome: Outcome|null, notice: Notice|null, numRecoveries: number, stallS: number}} Message
 * @typedef {{messages: Message[], nextKey: number, generationId: string|null, expectedSeq: number}} Conversation
 */

/** @returns {Conversation} */
export function emptyConversation() {
  return { messages: [], nextKey: 1, generationId: null, expectedSeq: 0 };
}

const RECOVERED_PIECES = 20; // for so many pieces a page says that the answer goes on

export function isGenerating(conversation) {
  return conversation.generationId !== null;
}

function message(key, role, content, state) {
  return { key, role, content, state, numTokens: 0, outcome: null, notice: null, numRecoveries: 0, stallS: 0 };
}

/** Return the conversation with the user's text and an answer that waits for its first token. */
export function ask(conversation, content, generationId) {
  const { messages, nextKey } = conversation;
  const asked = message(nextKey, 'user', content, 'final');
  return waitForAnswer({ ...conversation, messages: [...messages, asked], nextKey: nextKey + 1 }, generationId);
}

/** Return the conversation with its last answer, if there is one, thrown away and asked for again. */
export function askAgain(conversation, generationId) {
  const last = conversation.messages.at(-1);
  const messages = last?.role === 'assistant' ? conversation.messages.slice(0, -1) : conversation.messages;
  return waitForAnswer({ ...conversation, messages }, generationId);
}

function waitForAnswer(conversation, generationId) {
  const answer = message(conversation.nextKey, 'assistant', '', 'waiting');
  return {
    messages: [...conversation.messages, answer],
    nextKey: conversation.nextKey + 1,
    generationId,
    expectedSeq: 0,
  };
}

/** Return what to send: every message with content; an answer that was cut off stays part of what was said. */
export function toSend(conversation) {
  return conversation.messages
    .filter(({ role, content, state }) => state !== 'waiting' && (role === 'user' || content !== ''))
    .map(({ role, content }) => ({ role, content }));
}

function withLast(conversation, change, rest = {}) {
  const last = conversation.messages.at(-1);
  return { ...conversation, ...rest, messages: [...conversation.messages.slice(0, -1), { ...last, ...change }] };
}

/**
 * Return the conversation after an event of the site. Events of a generation that is over change nothing, and neither
 * do events of kinds that a later version may send.
 */
export function receive(conversation, event) {
  if (!isGenerating(conversation)) return conversation;
  if (event.id !== conversation.generationId && !(event.type === 'error' && event.id == null)) return conversation;
  const last = conversation.messages.at(-1);
  switch (event.type) {
    case 'delta':
      if (event.seq < conversation.expectedSeq) return conversation; // sent again after a resume
      return withLast(
        conversation,
        {
          content: last.content + event.text,
          state: 'streaming',
          numTokens: last.numTokens + (event.tokens ?? 0),
          notice: last.notice?.kind === 'recovered' && event.seq < last.notice.untilSeq ? last.notice : null,
        },
        { expectedSeq: event.seq + 1 },
      );
    case 'waiting': {
      const { cause, blocks, left_s: leftS } = event;
      return withLast(conversation, { notice: { kind: 'waiting', cause, blocks: blocks ?? [], leftS: leftS ?? null } });
    }
    case 'recovered':
      return withLast(conversation, {
        notice: { kind: 'recovered', untilSeq: conversation.expectedSeq + RECOVERED_PIECES },
        numRecoveries: last.numRecoveries + 1,
        stallS: last.stallS + (event.stall_s ?? 0),
      });
    case 'done': {
      const { finish_reason, usage, timings, times = null } = event;
      const state = finish_reason === 'cancelled' ? 'stopped' : 'final';
      const content = last.content.trimEnd() === '' ? '' : last.content;
      return withLast(conversation, { content, state, notice: null, outcome: { finish_reason, usage, timings, times } }, { generationId: null });
    }
    case 'error':
      return fail(conversation);
    default:
      return conversation;
  }
}

/** Return the conversation after its answer ended in an error; what was said of it stays. */
export function fail(conversation) {
  if (!isGenerating(conversation)) return conversation;
  return withLast(conversation, { state: 'failed', notice: null }, { generationId: null });
}

/** Return how much of the context the conversation uses, as {used, max}, or null before the first answer. */
export function contextUse(conversation, max) {
  const usage = conversation.messages.findLast(({ outcome }) => outcome?.usage)?.outcome.usage;
  if (!usage || !max) return null;
  return { used: Math.min(max, usage.prompt_tokens + usage.completion_tokens), max };
}
