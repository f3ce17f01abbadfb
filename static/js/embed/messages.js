/** Pure: what an embedded chat takes from the page around it, and from whom. Everything else is dropped without a word. */

export const NAMESPACE = 'umbel-chat';
export const VERSION = 1;

export const MAX_CHARS = 8000; // of a text for the message field; the loader cuts at the same
const MAX_CONTEXT = 4000; // of what a page says about itself
const MAX_HEADING = 80;
const THEMES = new Set(['auto', 'light', 'dark']);
const MODES = new Set(['bubble', 'inline']);

/** Whether a message is from the page around, which has to be one of those that the key names. */
export function isFromParent({ source, origin }, parent, origins) {
  return source === parent && origins.includes(origin);
}

/** Return a message with the fields that its type has, each checked; or null. */
export function readMessage(data) {
  if (!data || typeof data !== 'object' || data.ns !== NAMESPACE || data.v !== VERSION) return null;
  switch (data.type) {
    case 'hello':
    case 'open':
    case 'close':
      return { type: data.type };
    case 'set':
      return { type: 'set', look: readLook(data) };
    case 'send':
    case 'prefill':
      return isText(data.text) ? { type: data.type, text: data.text.trim().slice(0, MAX_CHARS) } : null;
    case 'context':
      return typeof data.text === 'string' ? { type: 'context', text: data.text.trim().slice(0, MAX_CONTEXT) } : null;
    default:
      return null;
  }
}

const isText = (value) => typeof value === 'string' && value.trim() !== '';

/**
 * Return how the page wants the chat to look: {theme, mode, lang, heading, accent}; null for what it does not say, or says
 * in a way that is not taken.
 */
export function readLook(values) {
  const { theme, mode, lang, heading, accent } = values;
  return {
    theme: THEMES.has(theme) ? theme : null,
    mode: MODES.has(mode) ? mode : null,
    lang: typeof lang === 'string' && /^[a-z]{2,3}(-[a-z\d]{2,8})*$/i.test(lang) ? lang : null,
    heading: isText(heading) ? heading.trim().slice(0, MAX_HEADING) : null,
    accent: typeof accent === 'string' && /^#([\da-f]{3}|[\da-f]{6})$/i.test(accent) ? accent.toLowerCase() : null,
  };
}

/** Return a message to the page around. */
export const message = (type, values = {}) => ({ ns: NAMESPACE, v: VERSION, type, ...values });
