/** The swarm's state as the site tells it: asked for from time to time, and only while somebody looks. */

import { byId, h } from './dom.js';
import { currentLanguage, t } from './i18n.js';
import { copyButton } from './message-actions.js';
import { joinCommand, stateText } from './texts.js';

const POLL_MS = 20_000;
const SLOW_TOKENS_PER_S = 1; // below, the predecessor asked people to connect a GPU

/** Event `change` when the models were asked for. */
export class Swarm extends EventTarget {
  models;
  #timer = 0;
  #shown = '';

  constructor(models) {
    super();
    this.models = models;
    addEventListener('visibilitychange', () => (document.visibilityState === 'visible' ? this.look() : clearTimeout(this.#timer)));
    addEventListener('online', () => this.look());
  }

  get(id) {
    return this.models.find((model) => model.id === id) ?? null;
  }

  /** Ask now, and go on asking. */
  async look() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.look(), POLL_MS);
    try {
      const answer = await fetch('/v1/models');
      if (!answer.ok) return;
      const { data } = await answer.json();
      this.models = data.map((model) => ({ ...model, missing: model.missing_blocks ?? [] }));
      this.dispatchEvent(new Event('change'));
    } catch {
      // The connection tells of a site that cannot be reached; here the last state stays.
    }
  }

  /** Show under the conversation what keeps answers from coming, or slow, and how to help. */
  paintNote(model, peers, speed) {
    const isSlow = typeof speed === 'number' && speed < SLOW_TOKENS_PER_S;
    const isMissing = model?.status === 'incomplete';
    const text = !model || (model.status === 'ready' && !isSlow) ? '' : isSlow && !isMissing ? t('swarm.slow') : stateText(model);
    if (text === this.#shown) return;
    this.#shown = text;
    const note = byId('swarm-note');
    note.hidden = text === '';
    note.replaceChildren(h('p', {}, `${text} `, h('a', { class: 'swarm-link', href: `/swarm?lang=${currentLanguage()}` }, t('swarm.link'))));
    if (!isSlow && !isMissing) return;
    const command = joinCommand(model.id, peers);
    const code = h('code', { dir: 'ltr', tabindex: '0' }, command);
    note.append(h('details', {}, h('summary', {}, t('swarm.join')), h('div', { class: 'command' }, code, copyButton(t('swarm.copy'), () => command))));
  }
}
