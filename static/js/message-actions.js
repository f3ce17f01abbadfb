/** What can be done with a message: buttons at its foot, the choice among its versions, and the form that edits it. */

import { canContinue } from './conversation.js';
import { h, icon } from './dom.js';
import { t } from './i18n.js';

const ICONS = {
  copy: 'M9 9h10v11H9zM5 15V4h10',
  check: 'M5 12.5l4.5 4.5L19 7.5',
  edit: 'M5 19l1-4L16 5l3 3L9 18zM14 7l3 3',
  again: 'M19 12a7 7 0 1 1-2.5-5.4M19 4v4h-4',
  previous: 'M14 6l-6 6 6 6',
  next: 'M10 6l6 6-6 6',
  report: 'M6 21V4M6 5h12l-3 4 3 4H6',
  delete: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13',
};

/** Return a small round button with an icon of its name. */
export function iconButton(name, label, onclick) {
  return h('button', { type: 'button', class: 'icon-button small', 'aria-label': label, title: label, onclick }, icon(ICONS[name]));
}

/** Return a button that copies `text()`, and tells whether it could. */
export function copyButton(label, text, onCopy = () => {}) {
  const button = iconButton('copy', label, async () => {
    const isCopied = await copyText(text());
    if (isCopied) {
      button.replaceChildren(icon(ICONS.check));
      setTimeout(() => button.replaceChildren(icon(ICONS.copy)), 1500);
    }
    onCopy(isCopied);
  });
  return button;
}

/** Copy a text; return whether the browser allowed it. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/**
 * The foot of a message. Handlers: `onCopied(isCopied)`, `onEdit(key, content)`, `onRegenerate(key)`,
 * `onContinue()`, `onSwitch(key, step)`, and `onReport(key)`, which resolves to whether it was sent, where answers can be
 * reported.
 */
export class MessageActions {
  #count = h('span', { class: 'version' });
  #previous;
  #next;
  #versions;
  #change;
  #continue;
  #report;
  #isReported = false;
  #message = null;

  constructor(role, handlers) {
    const isUser = role === 'user';
    const turn = (step) => () => handlers.onSwitch(this.#message.key, step);
    this.#previous = iconButton('previous', t('version.previous'), turn(-1));
    this.#next = iconButton('next', t('version.next'), turn(1));
    this.#versions = h('span', { class: 'versions', role: 'group', 'aria-label': t('version.label'), dir: 'ltr' }, this.#previous, this.#count, this.#next);
    this.#change = isUser
      ? iconButton('edit', t('message.edit'), () => handlers.onEdit(this.#message))
      : iconButton('again', t('answer.again'), () => handlers.onRegenerate(this.#message.key));
    const copy = copyButton(t(isUser ? 'message.copy' : 'answer.copy'), () => this.#message.content, handlers.onCopied);
    this.#continue = isUser ? null : h('button', { type: 'button', class: 'text-button small', onclick: () => handlers.onContinue() }, t('answer.continue'));
    this.#report = isUser || !handlers.onReport ? null : iconButton('report', t('report.button'), () => this.#tell(handlers.onReport));
    this.stats = h('span', { class: 'stats' });
    this.element = h('div', { class: 'foot' }, this.#versions, copy, this.#change, this.#report ?? '', this.#continue ?? '', this.stats);
  }

  async #tell(onReport) {
    if (this.#isReported || !(await onReport(this.#message.key))) return;
    this.#isReported = true; // but not disabled, which would take the focus away
    this.#report.replaceChildren(icon(ICONS.check));
    this.#report.setAttribute('aria-label', t('report.sent'));
    this.#report.title = t('report.sent');
  }

  /**
   * `place` is {index, count, isBusy, isLast}: which version this is, of how many, whether an answer is being written, and
   * whether this is the last message.
   */
  update(message, { index, count, isBusy, isLast }) {
    this.#message = message;
    this.#versions.hidden = count < 2;
    this.#count.textContent = t('version.count', { index: index + 1, count });
    this.#previous.disabled = isBusy || index === 0;
    this.#next.disabled = isBusy || index === count - 1;
    this.#change.disabled = isBusy;
    if (this.#report) this.#report.hidden = message.content === '' || message.state === 'waiting' || message.state === 'streaming';
    if (this.#continue) this.#continue.hidden = isBusy || !isLast || !canContinue(message);
    this.element.hidden = message.role === 'assistant' && message.content === '' && message.outcome === null && count < 2;
  }
}

/** Return a form that edits `text`; `onSend` gets the new text, `onCancel` is called for Esc as well. */
export function editForm(text, onSend, onCancel) {
  const field = h('textarea', { 'aria-label': t('message.edit'), dir: 'auto', rows: 3 });
  field.value = text;
  const submit = () => field.value.trim() && onSend(field.value.trim());
  const grow = () => {
    field.style.height = 'auto';
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  field.addEventListener('input', grow);
  field.addEventListener('keydown', (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === 'Escape') {
      event.stopPropagation();
      onCancel();
    } else if (event.key === 'Enter' && !event.shiftKey) {
      event.preventDefault();
      submit();
    }
  });
  const cancel = h('button', { type: 'button', class: 'text-button', onclick: onCancel }, t('dialog.cancel'));
  const send = h('button', { type: 'submit', class: 'text-button primary' }, t('composer.send'));
  const form = h('form', { class: 'edit-form' }, field, h('div', { class: 'edit-buttons' }, cancel, send));
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    submit();
  });
  queueMicrotask(() => {
    grow();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  });
  return form;
}
