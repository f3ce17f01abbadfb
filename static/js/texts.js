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

/** Return what to show for an error {code, message, retryable, request_id?}. */
export function errorText({ code, message, request_id: requestId }) {
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
