/** Pure: frames of protocol 3, and how long to wait before connecting again. */

/** Return the frame that opens a session; `embed` is the token of a page that is embedded elsewhere. */
export const openFrame = (model, embed = null) =>
  JSON.stringify({ type: 'open', protocol: 3, resume: true, ...(model ? { model } : {}), ...(embed ? { embed } : {}) });
export const resumeFrame = (token, { id, fromSeq }) => JSON.stringify({ type: 'resume', token, id, from_seq: fromSeq });

/** Return the frame that asks for an answer, or, if `isContinued`, for more of the one that the messages end with. */
export const generateFrame = (id, messages, params = {}, isContinued = false) =>
  JSON.stringify({ type: 'generate', id, messages, params, times: true, ...(isContinued ? { continue: true } : {}) });
export const cancelFrame = (id) => JSON.stringify({ type: 'cancel', id });
export const byeFrame = () => JSON.stringify({ type: 'bye' });
export const pingFrame = () => JSON.stringify({ type: 'ping' });

/** Return the event in a frame, or null for anything that is none. */
export function parseFrame(data) {
  if (typeof data !== 'string') return null;
  try {
    const event = JSON.parse(data);
    return event && typeof event === 'object' && typeof event.type === 'string' ? event : null;
  } catch {
    return null;
  }
}

/** Return the milliseconds to wait before attempt 0, 1, …: doubling from 1 s to 30 s, half of it by chance. */
export function backoffMs(attempt, random) {
  const most = Math.min(30_000, 1000 * 2 ** Math.min(attempt, 10));
  return most / 2 + (most / 2) * random;
}

/** Whether to connect again by itself after a close with this code; else the next message connects. */
export function reconnectsAfter(code) {
  return ![1000, 1008, 1009, 4403, 4408, 4409].includes(code);
}

/** Return the length of `text` in UTF-8, which is what the site limits. */
export function byteLength(text) {
  return new TextEncoder().encode(text).length;
}
