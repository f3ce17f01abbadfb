/** Formulas, by KaTeX, which is loaded when the first one is shown. */

import { h } from './dom.js';

const MAX_CHARS = 10_000;
const OPTIONS = { throwOnError: true, trust: false, strict: false, maxSize: 20, maxExpand: 1000 };

let loading = null;

/**
 * Return an element that shows `tex`: as it is written at first, and for good where it is no TeX.
 * @param {string} tex
 * @param {boolean} isDisplayed in a line of its own
 */
export function showMath(tex, isDisplayed) {
  const element = h('span', { class: isDisplayed ? 'math displayed' : 'math', dir: 'ltr' }, h('code', {}, tex));
  if (tex.length > MAX_CHARS) return element;
  loading ??= load();
  loading.then(
    ({ render }) => {
      const made = h('span');
      try {
        render(tex, made, { ...OPTIONS, displayMode: isDisplayed });
      } catch {
        return;
      }
      element.replaceChildren(...made.childNodes);
    },
    () => (loading = null),
  );
  return element;
}

function load() {
  document.head.append(h('link', { rel: 'stylesheet', href: new URL('../vendor/katex.css', import.meta.url).href }));
  return import('../vendor/katex.js');
}
