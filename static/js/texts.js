/** Pure: what people read: errors in plain words, speeds and lengths. */

import { shortNumber, t, wholeText } from './i18n.js';

export { shortNumber };

const ERRORS = new Set([
  'max_length_exceeded', 'cache_full', 'no_capacity', 'limit_exceeded', 'missing_blocks', 'model_loading', 'model_not_found',
  'stream_lost', 'peer_unreachable', 'timeout', 'draining', 'node_draining', 'origin_not_allowed', 'frame_too_large',
  'internal_error', 'disconnected', 'unreachable', 'interrupted', 'taken_over', 'embed_expired', 'embed_closed',
]);

/** Return what to show for an error {code, message, retryable, request_id?}; `blocks` are those that it waited for. */
export function errorText({ code, message, request_id: requestId, retry_after: retryAfter, blocks = [] }) {
  if (code === 'missing_blocks' && blocks.length) return t('error.missing_these_blocks', { blocks: blocksText(blocks) });
  if (code === 'limit_exceeded' && retryAfter) return t('error.limit_until', { time: shortTime(retryAfter) });
  if (!ERRORS.has(code)) return message ? t('error.other', { message }) : t('error.internal_error');
  return code === 'internal_error' && requestId ? t('error.internal_error_id', { id: requestId }) : t(`error.${code}`);
}

/** Return a duration: 35 ms, 0.4 s, 12 s. */
export function shortTime(seconds) {
  if (seconds < 0.1) return t('time.ms', { value: Math.max(1, Math.round(seconds * 1000)) });
  return t('time.s', { value: shortNumber(seconds) });
}

/** Return spans such as ["12:16"], half-open, as people read them: “blocks 12–15”. */
export function blocksText(spans) {
  const names = spans.map((span) => {
    const [start, end] = span.split(':').map(Number);
    return end - start === 1 ? t('blocks.one', { first: start }) : t('blocks.many', { first: start, last: end - 1 });
  });
  return names.join(', ') || t('blocks.some');
}

/** Return what happens to an answer that is being written, without what changes every second. */
export function noticeText(notice) {
  if (notice.kind !== 'waiting') return t(`notice.${notice.kind}`);
  const blocks = blocksText(notice.blocks);
  switch (notice.cause) {
    case 'looking':
      return t('notice.looking');
    case 'no_answer':
      return t('notice.no_answer');
    case 'missing_blocks': {
      const isOne = notice.blocks.length === 1 && spanLength(notice.blocks[0]) === 1;
      return t(isOne ? 'notice.missing_block' : 'notice.missing_blocks', { blocks });
    }
    default:
      return t('notice.full', { blocks });
  }
}

function spanLength(span) {
  const [start, end] = span.split(':').map(Number);
  return end - start;
}

/** Return how long a wait goes on, or nothing where that is not known. */
export function noticeTimeText(notice) {
  const hasEnd = notice.kind === 'waiting' && notice.cause !== 'looking' && notice.leftS !== null;
  return hasEnd ? t('time.left', { value: Math.max(1, Math.round(notice.leftS)) }) : '';
}

/** Return the note that stays with an answer that lost machines, or nothing. */
export function recoveredText({ numRecoveries, stallS }) {
  if (!numRecoveries) return '';
  return t('recovered.times', { count: numRecoveries, time: shortTime(stallS) });
}

const PARTS = [
  ['compute_s', 'times.compute'],
  ['wire_s', 'times.wire'],
  ['queue_s', 'times.queue'],
  ['client_s', 'times.client'],
  ['stall_s', 'times.stall'],
  ['total_s', 'times.all'],
];

/** Return the rows of the table of where the time went: [name, first token, one token, all]; what took none is left out. */
export function timesRows({ first_token: first, per_token: one, total }) {
  return PARTS.filter(([part]) => total[part] > 0).map(([part, name]) => [
    t(name), ...[first, one, total].map((column) => (column[part] > 0 ? shortTime(column[part]) : '–')),
  ]);
}

/** Return a name as it is written, also in the midst of text that runs from right to left. */
export const isolated = (name) => `\u2066${name}\u2069`;

/** Return the rows of the machines: [“blocks 0–11 · …Zb3rYm”, computing, network], for one token. */
export function hopRows({ hops }) {
  return hops.map(({ blocks, peer, per_token: one }) => [
    `${blocksText([blocks])} · ${isolated(peer)}`, ...[one.compute_s, one.wire_s].map((value) => (value > 0 ? shortTime(value) : '–')),
  ]);
}

/** Return the line under an answer, such as “12.3 tokens/s · first token after 0.4 s · stopped”. */
export function outcomeText({ finish_reason: reason, usage, timings }) {
  const parts = [];
  if (timings?.tokens_per_s) parts.push(t('outcome.speed', { speed: shortNumber(timings.tokens_per_s) }));
  else if (usage) parts.push(t('outcome.tokens', { count: usage.completion_tokens }));
  if (timings?.ttft_s != null) parts.push(t('outcome.first_token', { time: shortTime(timings.ttft_s) }));
  if (reason === 'cancelled') parts.push(t('outcome.stopped'));
  if (reason === 'length') parts.push(t('outcome.length'));
  return parts.join(' · ');
}

/** Return “312 of 2,048 tokens”. */
export function contextText({ used, max }) {
  return t('context.use', { used: wholeText(used), max: wholeText(max) });
}

/** Return the part of a model's name that tells models apart: what follows the organisation. */
export function modelText(name) {
  return name.split('/').at(-1) ?? name;
}

/** Return what state a model's swarm is in, as the list of models says. */
export function stateText({ status, missing = [] }) {
  if (status !== 'incomplete') return t(`model.${['ready', 'loading'].includes(status) ? status : 'failed'}`);
  const spans = missing.map((text) => text.match(/\d+/g)?.map(Number)).filter(Boolean);
  return t('model.incomplete', { blocks: blocksText(spans.map(([first, last = first]) => `${first}:${last + 1}`)) });
}

/** Return what happens before the first token: a place in the queue, or how much of the prompt was read. */
export function stageText(stage) {
  if (!stage) return '';
  if (stage.kind === 'queued') return t('stage.queued', { count: stage.position });
  return t('stage.prefill', { done: wholeText(stage.done), total: wholeText(stage.total) });
}

/** Return the command with which a machine joins the swarm of a model. */
export function joinCommand(model, peers) {
  const quoted = /^[\w@%+=:,./-]+$/.test(model) ? model : `'${model.replaceAll("'", "'\\''")}'`;
  return ['umbel-node run', quoted, ...(peers.length ? ['--initial-peers', ...peers] : [])].join(' ');
}
