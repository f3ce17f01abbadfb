/** Small questions in the browser's own modal dialogs, which keep the focus and make what is behind them inert. */

import { h } from './dom.js';
import { t } from './i18n.js';
import { keyNames, SHORTCUTS } from './shortcuts.js';

/** Show `content` in a dialog until it is closed; return what it was closed with, '' for Esc. */
function ask(title, content, buttons) {
  return new Promise((resolve) => {
    const heading = h('h2', { id: 'question-title' }, title);
    const form = h('form', { method: 'dialog' }, heading, content, h('div', { class: 'dialog-buttons' }, ...buttons));
    const dialog = h('dialog', { class: 'question', 'aria-labelledby': 'question-title' }, form);
    dialog.addEventListener('close', () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

const cancelButton = () => h('button', { type: 'submit', value: '', formnovalidate: true, class: 'text-button' }, t('dialog.cancel'));

/** Ask whether to do what `action` names; resolves to true or false. */
export async function confirmDialog({ title, text, action }) {
  const yes = h('button', { type: 'submit', value: 'yes', class: 'text-button danger' }, action);
  return (await ask(title, h('p', {}, text), [cancelButton(), yes])) === 'yes';
}

/** Ask for a line of text; resolves to null where it was left. */
export async function promptDialog({ title, label, value, action }) {
  const field = h('input', { type: 'text', 'aria-label': label, maxlength: 200, dir: 'auto', autofocus: true });
  field.value = value;
  // The first submit button is what Enter presses.
  const yes = h('button', { type: 'submit', value: 'yes', class: 'text-button primary' }, action);
  const answered = ask(title, field, [yes, cancelButton()]);
  field.select();
  return (await answered) === 'yes' ? field.value.trim() : null;
}

/** Show fields with a button that does what `action` names; resolves to whether it was pressed. */
export async function question({ title, content, action }) {
  // The first submit button is what Enter presses in a field.
  const yes = h('button', { type: 'submit', value: 'yes', class: 'text-button primary' }, action);
  return (await ask(title, content, [yes, cancelButton()])) === 'yes';
}

/** Tell something that was not to be missed. */
export function showNote({ title, text }) {
  return ask(title, h('p', {}, text), [h('button', { type: 'submit', value: '', class: 'text-button' }, t('dialog.close'))]);
}

/** Show the list of shortcuts. */
export function showShortcuts() {
  if (document.querySelector('dialog[open]')) return;
  const isMac = /mac|iphone|ipad/i.test(navigator.platform);
  const rows = SHORTCUTS.flatMap((shortcut) => [
    h('dt', {}, t(`shortcut.${shortcut.name}`)),
    h('dd', { dir: 'ltr' }, ...keyNames(shortcut, isMac).map((key) => h('kbd', {}, key))),
  ]);
  ask(t('shortcut.title'), h('dl', { class: 'shortcuts' }, ...rows), [h('button', { type: 'submit', value: '', class: 'text-button' }, t('dialog.close'))]);
}
