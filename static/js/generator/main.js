/** The page that writes snippets: what is chosen becomes a line to copy, and a chat to look at. */

import { byId, h } from '../dom.js';
import { languageName } from '../i18n.js';
import { copyText } from '../message-actions.js';
import { elementAttributes, frameAddress, snippet } from './snippet.js';

const PREVIEW_MS = 500; // after the last change, so that a key that is being typed is not asked for letter by letter

const config = JSON.parse(byId('config').textContent);
let timer = 0;

byId('lang').append(...config.languages.map((name) => h('option', { value: name, lang: name }, languageName(name))));

function choices() {
  const value = (id) => byId(id).value.trim();
  const accent = byId('own-accent').checked ? value('accent') : '';
  const names = ['key', 'form', 'title', 'position', 'theme', 'lang', 'width', 'height'];
  return { ...Object.fromEntries(names.map((name) => [name, value(name)])), accent, isPinned: byId('pinned').checked };
}

function update() {
  const chosen = choices();
  for (const element of document.querySelectorAll('[data-for]')) element.hidden = !element.dataset.for.split(' ').includes(chosen.form);
  byId('snippet').textContent = snippet(chosen, config);
  clearTimeout(timer);
  timer = setTimeout(() => preview(chosen), PREVIEW_MS);
}

function preview(chosen) {
  if (!chosen.key) return byId('preview').replaceChildren();
  if (chosen.form === 'iframe') {
    const frame = h('iframe', { title: 'Chat', src: frameAddress(chosen, config), allow: 'clipboard-write' });
    return byId('preview').replaceChildren(frame);
  }
  const element = h('umbel-chat', elementAttributes(chosen));
  byId('preview').replaceChildren(element);
}

byId('choices').addEventListener('input', update);
byId('choices').addEventListener('submit', (event) => event.preventDefault());
byId('copy').addEventListener('click', async () => {
  byId('status').textContent = (await copyText(byId('snippet').textContent)) ? 'Copied' : 'Copying is not allowed here';
});
update();
