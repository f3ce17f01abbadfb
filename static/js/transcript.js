/** The conversation on the page: a view for each message that is shown, and an alert behind them. */

import { byId, h } from './dom.js';
import { t } from './i18n.js';
import { MessageView } from './render.js';
import { errorText } from './texts.js';
import { path, version } from './tree.js';

export class Transcript {
  #chat;
  #handlers;
  #onNew;
  #error = null;
  /** @type {Map<number, MessageView>} */
  #views = new Map();

  /**
   * `onCopied(isCopied)` tells of copying; `onNew()` begins another chat, where this one is too long to go on. `report` takes
   * {messages} up to an answer, where answers can be reported.
   */
  constructor({ chat, onCopied, onNew, report = null }) {
    this.#chat = chat;
    this.#onNew = onNew;
    this.#handlers = {
      onCopied,
      onEdit: (key, text) => chat.edit(key, text),
      onContinue: () => chat.continue(),
      onRegenerate: (key) => chat.again(key),
      onSwitch: (key, step) => chat.switchVersion(key, step),
      onReport: report && ((key) => report(this.#upTo(key))),
    };
  }

  /** Forget what is shown: another conversation, or another language. */
  clear() {
    for (const view of this.#views.values()) view.element.remove();
    this.#views.clear();
    this.#error = null;
    byId('alerts').replaceChildren();
  }

  paint() {
    const { conversation } = this.#chat;
    const shown = path(conversation);
    const known = new Set(shown.map(({ key }) => key));
    for (const [key, view] of this.#views) {
      if (known.has(key)) continue;
      view.element.remove();
      this.#views.delete(key);
    }
    for (const message of shown) {
      let view = this.#views.get(message.key);
      if (!view) {
        view = new MessageView(message.role, this.#handlers);
        this.#views.set(message.key, view);
        byId('messages').append(view.element);
      }
      view.update(message, { ...version(conversation, message), isBusy: this.#chat.isGenerating, isLast: message === shown.at(-1) });
    }
    this.#paintAlert();
  }

  /** Return what was said up to a message, as {messages}. */
  #upTo(key) {
    const shown = path(this.#chat.conversation);
    const said = shown.slice(0, shown.findIndex((message) => message.key === key) + 1).filter(({ content }) => content !== '');
    return { messages: said.map(({ role, content }) => ({ role, content })) };
  }

  /** Turn a message into a form. */
  edit(key) {
    this.#views.get(key)?.edit((text) => this.#chat.edit(key, text));
  }

  #paintAlert() {
    const { error } = this.#chat;
    if (error === this.#error) return;
    this.#error = error;
    if (!error) return byId('alerts').replaceChildren();
    const isFull = error.code === 'max_length_exceeded';
    const button = h('button', { type: 'button', class: 'text-button', onclick: () => (isFull ? this.#onNew() : this.#chat.again()) }, t(isFull ? 'chat.new' : 'chat.retry'));
    byId('alerts').replaceChildren(h('div', { class: 'alert', role: 'alert' }, h('p', {}, errorText(error)), button));
  }
}
