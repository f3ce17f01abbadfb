/** Colours for code, by a library that is loaded when the first block of code is whole. */

import { h } from './dom.js';

const MAX_CHARS = 50_000;
const NO_LANGUAGE = new Set(['', 'text', 'plain', 'plaintext', 'txt', 'output']);

const MAX_KEPT = 8; // code in a list is made anew with its item, at every token that the item gets

let loading = null;
/** @type {Map<string, object>} trees of colours by language and text, the latest last */
const kept = new Map();

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
      code.replaceChildren(...coloursOf(lowlight, name, text.replace(/\n$/, '')).children.map(elementOf));
    },
    () => (loading = null), // offline: it stays without colours, and the next block tries again
  );
}

function coloursOf(lowlight, name, text) {
  const key = `${name}\n${text}`;
  const tree = kept.get(key) ?? lowlight.highlight(name, text);
  kept.delete(key);
  kept.set(key, tree);
  if (kept.size > MAX_KEPT) kept.delete(kept.keys().next().value);
  return tree;
}

function elementOf(node) {
  if (node.type === 'text') return document.createTextNode(node.value);
  return h('span', { class: node.properties.className.join(' ') }, ...node.children.map(elementOf));
}
