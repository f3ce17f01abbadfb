/** Messages as elements: only what changed is touched, and only text is ever inserted. */

import { AnswerView } from './answer.js';
import { h, icon } from './dom.js';
import { t } from './i18n.js';
import { hopRows, noticeText, noticeTimeText, outcomeText, recoveredText, timesRows } from './texts.js';

const COPY = 'M9 9h10v11H9zM5 15V4h10';
const CHECK = 'M5 12.5l4.5 4.5L19 7.5';

/** One message on the page; `update` brings it to a new state. */
export class MessageView {
  #body = h('div', { class: 'body', dir: 'auto' });
  #foot = h('div', { class: 'foot' });
  #stats = h('span', { class: 'stats' });
  #noticeText = h('span');
  #noticeTime = h('span', { class: 'notice-time' });
  #notice = h('div', { class: 'route-notice', hidden: true }, h('span', { class: 'pulse', 'aria-hidden': 'true' }), this.#noticeText, this.#noticeTime);
  #times = h('div');
  #message = null;
  #answer = null;

  constructor(role, onCopy) {
    const name = t(`role.${role}`);
    this.element = h('article', { class: `message ${role}`, 'aria-label': name }, this.#body, this.#foot);
    if (role === 'user') return;
    this.#foot.append(copyButton(t('answer.copy'), () => this.#message.content, onCopy), this.#stats);
    this.#foot.before(this.#notice);
    this.element.append(this.#times);
  }

  update(message) {
    if (message === this.#message) return;
    const isNewText = message.content !== this.#message?.content || message.state !== this.#message?.state;
    const isNewReport = message.outcome?.times !== this.#message?.outcome?.times;
    this.#message = message;
    this.element.dataset.state = message.state;
    this.element.setAttribute('aria-busy', String(message.state === 'waiting' || message.state === 'streaming'));
    if (isNewText) this.#renderText(message);
    if (message.role !== 'assistant') return;
    this.#foot.hidden = message.content === '' && message.outcome === null;
    this.#stats.textContent = statsText(message);
    this.#renderNotice(message.notice);
    if (isNewReport) this.#times.replaceChildren(...timesReport(message.outcome?.times));
  }

  /** Only texts that changed are touched: a wait counts down every second. */
  #renderNotice(notice) {
    this.#notice.hidden = !notice;
    if (!notice) return;
    this.#notice.dataset.kind = notice.kind;
    if (this.#noticeText.textContent !== noticeText(notice)) this.#noticeText.textContent = noticeText(notice);
    this.#noticeTime.textContent = noticeTimeText(notice);
  }

  #renderText({ role, content, state }) {
    if (state === 'waiting' || (content === '' && state !== 'streaming')) {
      this.#answer = null;
      return this.#body.replaceChildren(state === 'waiting' ? dots() : h('p', { class: 'empty' }, emptyText(state)));
    }
    if (role === 'user') return this.#body.replaceChildren(h('p', {}, content));
    if (!this.#answer) {
      this.#body.replaceChildren();
      this.#answer = new AnswerView(this.#body, codeBlock);
    }
    this.#answer.update(content, state !== 'streaming');
  }
}

function codeBlock(language, code) {
  const bar = h('div', { class: 'code-bar' }, h('span', {}, language || t('answer.code')), copyButton(t('answer.copy_code'), () => code.textContent));
  return h('figure', { class: 'code', dir: 'ltr' }, bar, h('pre', { tabindex: '0' }, code));
}

function copyButton(label, text, onCopy = () => {}) {
  const button = h('button', { type: 'button', class: 'icon-button small', 'aria-label': label, title: label }, icon(COPY));
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      return onCopy(false);
    }
    button.replaceChildren(icon(CHECK));
    setTimeout(() => button.replaceChildren(icon(COPY)), 1500);
    onCopy(true);
  });
  return button;
}

function dots() {
  return h('div', { class: 'dots' }, h('span'), h('span'), h('span'));
}

function emptyText(state) {
  return t(state === 'stopped' ? 'answer.stopped_empty' : state === 'failed' ? 'answer.none' : 'answer.empty');
}

function statsText(message) {
  const { state, outcome } = message;
  const ending = outcome ? outcomeText(outcome) : state === 'failed' ? t('answer.broken_off') : '';
  return [ending, recoveredText(message)].filter(Boolean).join(' · ');
}

/** Return the elements that tell where the time of an answer went; none without a report of at least a token. */
function timesReport(times) {
  if (!times?.tokens) return [];
  const hops = hopRows(times);
  const tables = [table(['', t('times.first'), t('times.token'), t('times.all')], timesRows(times))];
  if (hops.length) tables.push(table([t('times.token_at'), t('times.compute'), t('times.wire')], hops));
  return [h('details', { class: 'times' }, h('summary', {}, t('times.title')), h('div', { class: 'tables', tabindex: '0', role: 'group', 'aria-label': t('times.title') }, ...tables))];
}

function table(head, rows) {
  const headCells = head.map((name) => (name ? h('th', { scope: 'col' }, name) : h('td')));
  const body = rows.map(([name, ...cells]) => h('tr', {}, h('th', { scope: 'row' }, name), ...cells.map((cell) => h('td', {}, cell))));
  return h('table', {}, h('thead', {}, h('tr', {}, ...headCells)), h('tbody', {}, ...body));
}
