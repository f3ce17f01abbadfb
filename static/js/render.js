/** Messages as elements: only what changed is touched, and only text is ever inserted. */

import { AnswerView } from './answer.js';
import { h } from './dom.js';
import { t } from './i18n.js';
import { copyButton, editForm, MessageActions } from './message-actions.js';
import { blocksText, hopRows, isolated, noticeText, noticeTimeText, outcomeText, recoveredText, stageText, timesRows } from './texts.js';

/** One message on the page; `update` brings it to a new state. */
export class MessageView {
  #body = h('div', { class: 'body', dir: 'auto' });
  #actions;
  #form = null;
  #noticeText = h('span');
  #noticeTime = h('span', { class: 'notice-time' });
  #notice = h('div', { class: 'route-notice', hidden: true }, h('span', { class: 'pulse', 'aria-hidden': 'true' }), this.#noticeText, this.#noticeTime);
  #times = h('div');
  #route = h('div');
  #stage = h('div', { class: 'stage', hidden: true });
  #message = null;
  #answer = null;

  /** `handlers` are those of MessageActions, but `onEdit(key, content)` comes when an edited text is to be sent. */
  constructor(role, handlers) {
    const startEdit = (message) => this.edit((text) => handlers.onEdit(message.key, text));
    this.#actions = new MessageActions(role, { ...handlers, onEdit: startEdit });
    this.element = h('article', { class: `message ${role}`, 'aria-label': t(`role.${role}`) }, this.#body, this.#actions.element);
    if (role === 'user') return;
    this.#actions.element.before(this.#notice);
    this.#actions.element.before(this.#stage);
    this.element.append(this.#route, this.#times);
  }

  /** Turn the message into a form, until it is sent or left. */
  edit(onSend) {
    const hadForm = this.#form !== null;
    this.#endEdit();
    if (hadForm) return;
    this.#form = editForm(
      this.#message.content,
      (text) => {
        this.#endEdit();
        onSend(text);
      },
      () => this.#endEdit(),
    );
    this.element.prepend(this.#form);
    this.element.classList.add('is-edited');
  }

  #endEdit() {
    this.#form?.remove();
    this.#form = null;
    this.element.classList.remove('is-edited');
  }

  update(message, place) {
    this.#actions.update(message, place);
    if (message === this.#message) return;
    const isNewText = message.content !== this.#message?.content || message.state !== this.#message?.state;
    const isNewReport = message.outcome?.times !== this.#message?.outcome?.times;
    const isNewRoute = message.route !== this.#message?.route || message.state !== this.#message?.state;
    const isNewStage = message.stage !== this.#message?.stage;
    this.#message = message;
    this.element.dataset.state = message.state;
    this.element.setAttribute('aria-busy', String(message.state === 'waiting' || message.state === 'streaming'));
    if (isNewText) this.#renderText(message);
    if (message.role !== 'assistant') return;
    this.#actions.stats.textContent = statsText(message);
    this.#renderNotice(message.notice);
    if (isNewStage) this.#renderStage(message.stage);
    if (isNewRoute) this.#route.replaceChildren(...routeReport(message));
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

  #renderStage(stage) {
    this.#stage.hidden = !stage;
    if (!stage) return;
    const bar = stage.kind === 'prefill' ? h('progress', { max: stage.total, value: stage.done, 'aria-hidden': 'true' }) : null;
    this.#stage.replaceChildren(stageText(stage), ...(bar ? [bar] : []));
  }

  #renderText({ role, content, state }) {
    if (state === 'waiting' || (content === '' && state !== 'streaming')) {
      this.#answer = null;
      this.#body.dir = ''; // the page's
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

/** Return the elements that tell which nodes made an answer that is over. */
function routeReport({ route, state }) {
  if (!route?.length || state === 'waiting' || state === 'streaming') return [];
  const parts = route.map(({ blocks, peer }) => h('li', {}, t('route.part', { blocks: blocksText([blocks]), peer: isolated(peer) })));
  const count = new Set(route.map(({ peer }) => peer)).size;
  return [h('details', { class: 'times' }, h('summary', {}, t('route.served', { count })), h('ul', { class: 'route' }, ...parts))];
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
