/** Colours for code, by a library that is loaded when the first block of code is whole. */

import { h } from './dom.js';

const MAX_CHARS = 50_000;
const NO_LANGUAGE = new Set(['', 'text', 'plain', 'plaintext', 'txt', 'output']);

let loading = null;

/**
 * Colour the `text` in `code`, soon; a language that is not known stays as it is.
 * @param {HTMLElement} code
 * @param {string} language
 * @param {string} text
 */
export function showCode(code, language, text) {
  if (NO_LANGUAGE.has(language.toLowerCase()) || text.length > MAX_CHARS) return;
  loading ??= import('../vendor/lowlight.js');
  loading.then(
    ({ lowlight }) => {
      const name = language.toLowerCase();
      if (!lowlight.registered(name)) return;
      code.replaceChildren(...lowlight.highlight(name, text.replace(/\n$/, '')).children.map(elementOf));
    },
    () => (loading = null), // offline: it stays without colours, and the next block tries again
  );
}

function elementOf(node) {
  if (node.type === 'text') return document.createTextNode(node.value);
  return h('span', { class: node.properties.className.join(' ') }, ...node.children.map(elementOf));
}
