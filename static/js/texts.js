/** Pure: what people read: errors in plain words, speeds and lengths. */

const ERRORS = {
  max_length_exceeded: 'This conversation is longer than the model can remember. Start a new chat.',
  cache_full: 'All machines that could answer are full right now. Try again in a moment.',
  no_capacity: 'The site is busy. Try again in a minute.',
  limit_exceeded: 'You have reached a limit of this site. Try again later.',
  missing_blocks: 'Part of the model is offline right now: not enough volunteers are connected. Try again later.',
  model_loading: 'The model is still being loaded. Try again in a minute.',
  model_not_found: 'This model is not offered here any more. Reload the page.',
  stream_lost: 'A volunteer’s machine left in the middle of the answer. Try again to continue with another.',
  peer_unreachable: 'A volunteer’s machine cannot be reached. Try again.',
  timeout: 'A volunteer’s machine took too long. Try again.',
  draining: 'The site is restarting. Try again in a few seconds.',
  node_draining: 'A volunteer’s machine is leaving. Try again.',
  origin_not_allowed: 'This page may not talk to the site. Open the site’s own address.',
  frame_too_large: 'The message is too long.',
  internal_error: 'Something went wrong on the site.',
  disconnected: 'The connection was lost. Check your network and try again.',
  unreachable: 'The site cannot be reached, or has no free place. Try again in a minute.',
};

/** Return what to show for an error {code, message, retryable, request_id?}; `blocks` are those that it waited for. */
export function errorText({ code, message, request_id: requestId, blocks = [] }) {
  if (code === 'missing_blocks' && blocks.length) {
    return `Part of the model is offline right now: ${blocksText(blocks)}. Nobody brought it back in time. Try again later.`;
  }
  const known = Object.hasOwn(ERRORS, code) ? ERRORS[code] : null;
  if (!known) return message ? `The site answered: ${message}` : ERRORS.internal_error;
  return code === 'internal_error' && requestId ? `${known} Its log knows more under ${requestId}.` : known;
}

const whole = new Intl.NumberFormat('en');

/** Return a number with about three digits: 0.4, 12.3, 145. */
export function shortNumber(value) {
  return value >= 100 ? whole.format(Math.round(value)) : value.toFixed(1);
}

/** Return a duration: 35 ms, 0.4 s, 12 s. */
export function shortTime(seconds) {
  return seconds < 0.1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${shortNumber(seconds)} s`;
}

/** Return spans such as ["12:16"], half-open, as people read them: “blocks 12–15”. */
export function blocksText(spans) {
  const names = spans.map((span) => {
    const [start, end] = span.split(':').map(Number);
    return end - start === 1 ? `block ${start}` : `blocks ${start}–${end - 1}`;
  });
  return names.join(', ') || 'some blocks';
}

/** Return what happens to an answer that is being written, without what changes every second. */
export function noticeText(notice) {
  if (notice.kind === 'recovered') return 'Going on.';
  const blocks = blocksText(notice.blocks);
  const isOne = notice.blocks.length === 1 && blocks.startsWith('block ');
  switch (notice.cause) {
    case 'looking':
      return 'A volunteer’s machine left; looking for another…';
    case 'no_answer':
      return 'A volunteer’s machine is silent, and no other has its part; waiting for it…';
    case 'missing_blocks':
      return `Waiting: ${blocks} ${isOne ? 'has' : 'have'} no node.`;
    default:
      return `Waiting: no machine can take ${blocks} just now.`;
  }
}

/** Return how long a wait goes on, or nothing where that is not known. */
export function noticeTimeText(notice) {
  const hasEnd = notice.kind === 'waiting' && notice.cause !== 'looking' && notice.leftS !== null;
  return hasEnd ? `${Math.max(1, Math.round(notice.leftS))} s left` : '';
}

/** Return the note that stays with an answer that lost machines, or nothing. */
export function recoveredText({ numRecoveries, stallS }) {
  if (!numRecoveries) return '';
  const times = numRecoveries === 1 ? '' : ` ${numRecoveries} times`;
  return `went on${times} after a machine was missing, ${shortTime(stallS)} lost`;
}

const PARTS = [
  ['compute_s', 'Computing'],
  ['wire_s', 'Network'],
  ['queue_s', 'Queues'],
  ['client_s', 'This site'],
  ['stall_s', 'Lost machines'],
  ['total_s', 'All'],
];

/** Return the rows of the table of where the time went: [name, first token, one token, all]; what took none is left out. */
export function timesRows({ first_token: first, per_token: one, total }) {
  return PARTS.filter(([part]) => total[part] > 0).map(([part, name]) => [
    name, ...[first, one, total].map((column) => (column[part] > 0 ? shortTime(column[part]) : '–')),
  ]);
}

/** Return the rows of the machines: [“blocks 0–11 · …Zb3rYm”, computing, network], for one token. */
export function hopRows({ hops }) {
  return hops.map(({ blocks, peer, per_token: one }) => [
    `${blocksText([blocks])} · ${peer}`, ...[one.compute_s, one.wire_s].map((value) => (value > 0 ? shortTime(value) : '–')),
  ]);
}

/** Return the line under an answer, such as “12.3 tokens/s · first token after 0.4 s · stopped”. */
export function outcomeText({ finish_reason: reason, usage, timings }) {
  const parts = [];
  if (timings?.tokens_per_s) parts.push(`${shortNumber(timings.tokens_per_s)} tokens/s`);
  else if (usage) parts.push(usage.completion_tokens === 1 ? '1 token' : `${whole.format(usage.completion_tokens)} tokens`);
  if (timings?.ttft_s != null) parts.push(`first token after ${shortTime(timings.ttft_s)}`);
  if (reason === 'cancelled') parts.push('stopped');
  if (reason === 'length') parts.push('cut at its greatest length');
  return parts.join(' · ');
}

/** Return “312 of 2,048 tokens”. */
export function contextText({ used, max }) {
  return `${whole.format(used)} of ${whole.format(max)} tokens`;
}

/** Return the part of a model's name that tells models apart: what follows the organisation. */
export function modelText(name) {
  return name.split('/').at(-1) ?? name;
}
