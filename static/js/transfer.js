/** Pure: conversations as files: JSON that can be read back, and Markdown for people. */

import { titleOf } from './search.js';
import { path } from './tree.js';

const FORMAT = 'umbel-conversations';
const ROLES = new Set(['user', 'assistant']);
const ENDS = new Set(['final', 'stopped', 'failed']);

/** Return a file's text with these conversations, all versions included. */
export function toJson(records) {
  const conversations = records.map(({ id, name, createdMs, updatedMs, system, messages, chosen }) => ({
    id, name, createdMs, updatedMs, system, chosen,
    messages: messages.map(({ key, parent, role, content, state, outcome }) => ({
      key, parent, role, content, state: ENDS.has(state) ? state : 'stopped', outcome,
    })),
  }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Return the conversations in a file's text, whole and checked. Raises Error where it is none of ours. */
export function fromJson(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) throw new Error('another format');
  return file.conversations.map(readConversation);
}

function readConversation(found) {
  if (typeof found?.id !== 'string' || !/^[\w-]{8,64}$/.test(found.id) || !Array.isArray(found.messages)) throw new Error('no conversation');
  const keys = new Set([0]);
  const messages = found.messages.map((message) => {
    // A parent stands in front of its children, so that a file can make no circle.
    const isWhole = Number.isSafeInteger(message?.key) && message.key > 0 && !keys.has(message.key) && keys.has(message.parent) &&
      ROLES.has(message.role) && typeof message.content === 'string' && ENDS.has(message.state);
    if (!isWhole) throw new Error('a broken message');
    keys.add(message.key);
    return readMessage(message);
  });
  const chosen = {};
  for (const [parent, key] of Object.entries(found.chosen ?? {})) if (keys.has(Number(parent)) && keys.has(key)) chosen[Number(parent)] = key;
  return {
    id: found.id, name: textOf(found.name).slice(0, 200), createdMs: numberOf(found.createdMs), updatedMs: numberOf(found.updatedMs),
    system: textOf(found.system), isTemporary: false, messages, chosen, nextKey: Math.max(...keys) + 1,
    generationId: null, answerKey: 0, expectedSeq: 0,
  };
}

function readMessage({ key, parent, role, content, state, outcome }) {
  const usage = outcome?.usage;
  const isKnown = typeof outcome?.finish_reason === 'string' && Number.isFinite(usage?.prompt_tokens) && Number.isFinite(usage?.completion_tokens);
  const speed = (value) => (Number.isFinite(value) ? value : null);
  return {
    key, parent, role, content, state, stage: null, numTokens: 0, notice: null, route: null, numRecoveries: 0, stallS: 0,
    outcome: isKnown
      ? {
          finish_reason: outcome.finish_reason,
          usage: { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens },
          timings: { ttft_s: speed(outcome.timings?.ttft_s), tokens_per_s: speed(outcome.timings?.tokens_per_s) },
          times: null,
        }
      : null,
  };
}

const textOf = (value) => (typeof value === 'string' ? value : '');
const numberOf = (value) => (Number.isFinite(value) ? value : 0);

/** Return what is shown of a conversation as Markdown; `names` are what the roles are called. */
export function toMarkdown(record, names) {
  const parts = [`# ${titleOf(record).replace(/\s+/g, ' ')}`];
  if (record.system) parts.push(`> ${record.system.trim().replaceAll('\n', '\n> ')}`);
  for (const { role, content } of path(record)) parts.push(`## ${names[role]}`, content.trim());
  return `${parts.join('\n\n')}\n`;
}

/** Return a name for a file: letters and digits of `title`, which may be anything. */
export function fileName(title, extension) {
  const base = title.replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 50);
  return `${base || 'umbel'}.${extension}`;
}
