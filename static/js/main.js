/** The chat page: events of the person and of the site change the conversation; once a frame it is painted. */

import { Composer } from './composer.js';
import { Connection } from './connection.js';
import { ask, askAgain, contextUse, edit, emptyConversation, fail, isGenerating, lastShown, receive, toSend } from './conversation.js';
import { byId, h } from './dom.js';
import { byteLength, cancelFrame, generateFrame } from './frames.js';
import { t } from './i18n.js';
import { setLanguage } from './language.js';
import { MessageView } from './render.js';
import { Follower } from './scroll.js';
import { contextText, errorText, modelText, noticeText } from './texts.js';
import { setUpTheme } from './theme.js';
import { find, path, switchVersion, version } from './tree.js';

const config = JSON.parse(byId('config').textContent);
await setLanguage(config.languages);
const model = config.models[0] ?? null;

let conversation = emptyConversation();
let maxLength = model?.context_length ? Math.min(model.context_length, config.session_max_length) : 0;
let error = null; // what the alert shows: {code, message, retryable}
let isPaintDue = false;
/** @type {Map<number, MessageView>} */
const views = new Map();

const follower = new Follower(byId('scroller'), byId('to-end'));
const socketUrl = new URL(config.socket_path, location.href);
socketUrl.protocol = location.protocol === 'https:' ? 'wss:' : 'ws:';
const connection = new Connection(socketUrl.href, config.ping_interval_s);
connection.model = model?.id ?? null;
const composer = new Composer({ onSend: send, onStop: stop, onType: () => connection.connect() });

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

const answerOf = (found) => find(found, found.answerKey);

function change(next) {
  const wasGenerating = isGenerating(conversation);
  announceNotice(answerOf(conversation)?.notice, answerOf(next)?.notice);
  conversation = next;
  if (wasGenerating && !isGenerating(next)) announceEnd();
  paintSoon();
}

function send(text) {
  start(ask(conversation, text, newId()));
}

function retry() {
  start(askAgain(conversation, newId()));
}

const messageHandlers = {
  onCopied: (isCopied) => (byId('status').textContent = t(isCopied ? 'status.copied' : 'status.copy_refused')),
  onEdit: (key, text) => start(edit(conversation, key, text, newId())),
  onRegenerate: (key) => start(askAgain(conversation, newId(), key)),
  onSwitch(key, step) {
    error = null;
    const next = switchVersion(conversation, key, step);
    const shown = version(next, path(next).find(({ parent }) => parent === find(next, key).parent));
    byId('status').textContent = t('version.shown', { index: shown.index + 1, count: shown.count });
    change(next);
  },
};

function start(next) {
  error = null;
  byId('status').textContent = t('status.generating');
  change(next);
  follower.toEnd();
  const frame = generateFrame(conversation.generationId, toSend(conversation));
  if (byteLength(frame) > config.max_frame_bytes) return failWith({ code: 'frame_too_large', retryable: false });
  connection.send(frame);
}

function stop() {
  if (!isGenerating(conversation)) return;
  const id = conversation.generationId;
  const end = () => change(receive(conversation, { type: 'done', id, finish_reason: 'cancelled' }));
  // The site confirms within a step; a person need not wait for a step that hangs.
  if (connection.sendNow(cancelFrame(id))) setTimeout(end, 3000);
  else end();
}

function newChat() {
  if (isGenerating(conversation)) connection.sendNow(cancelFrame(conversation.generationId));
  error = null;
  conversation = emptyConversation();
  byId('status').textContent = t('chat.new');
  paintSoon();
  composer.focus();
}

function failWith(problem) {
  const notice = answerOf(conversation)?.notice;
  error = { ...problem, blocks: notice?.kind === 'waiting' ? notice.blocks : [] };
  byId('status').textContent = ''; // the alert speaks
  change(fail(conversation));
}

connection.addEventListener('event', ({ detail: event }) => {
  if (event.type === 'opened') {
    maxLength = event.limits?.max_length ?? maxLength;
    return paintSoon();
  }
  const isMine = event.id == null || event.id === conversation.generationId;
  if (event.type === 'error' && isGenerating(conversation) && isMine) return failWith(event);
  change(receive(conversation, event));
});

connection.addEventListener('lost', ({ detail: { wasWaiting } }) => {
  if (!isGenerating(conversation)) return;
  failWith({ code: wasWaiting ? 'unreachable' : 'disconnected', retryable: true });
});

/** Say what happens to the answer when that changes, and not every second that a wait takes. */
function announceNotice(before, now) {
  if (now && (!before || noticeText(before) !== noticeText(now))) byId('status').textContent = noticeText(now);
}

function announceEnd() {
  const last = answerOf(conversation);
  if (error || !last) return;
  byId('status').textContent = last.state === 'stopped' ? t('status.stopped') : t('status.complete', { text: last.content });
}

function paintSoon() {
  if (isPaintDue) return;
  isPaintDue = true;
  requestAnimationFrame(paint);
}

function paint() {
  isPaintDue = false;
  paintMessages();
  paintAlert();
  byId('welcome').hidden = conversation.messages.length > 0;
  composer.isGenerating = isGenerating(conversation);
  const use = contextUse(conversation, maxLength);
  byId('context').hidden = use === null;
  if (use) {
    byId('context-meter').value = use.used / use.max;
    byId('context-text').textContent = contextText(use);
  }
  follower.follow();
}

function paintMessages() {
  const shown = path(conversation);
  const known = new Set(shown.map(({ key }) => key));
  for (const [key, view] of views) {
    if (known.has(key)) continue;
    view.element.remove();
    views.delete(key);
  }
  const isBusy = isGenerating(conversation);
  for (const message of shown) {
    let view = views.get(message.key);
    if (!view) {
      view = new MessageView(message.role, messageHandlers);
      views.set(message.key, view);
      byId('messages').append(view.element);
    }
    view.update(message, { ...version(conversation, message), isBusy });
  }
}

let paintedError = null;

function paintAlert() {
  if (error === paintedError) return;
  paintedError = error;
  if (!error) return byId('alerts').replaceChildren();
  const button = error.code === 'max_length_exceeded'
    ? h('button', { type: 'button', class: 'text-button', onclick: newChat }, t('chat.new'))
    : h('button', { type: 'button', class: 'text-button', onclick: retry }, t('chat.retry'));
  byId('alerts').replaceChildren(h('div', { class: 'alert', role: 'alert' }, h('p', {}, errorText(error)), button));
}

byId('new-chat').addEventListener('click', newChat);
addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && isGenerating(conversation) && !event.isComposing) stop();
  else if (event.key === 'Escape' && event.shiftKey) composer.focus();
  else if (event.key.toLowerCase() === 'o' && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    newChat();
  }
});
setUpTheme(byId('theme'));
byId('model-name').textContent = model ? modelText(model.id) : t('page.no_model');
byId('model-name').title = model?.id ?? '';
if (matchMedia('(pointer: fine)').matches) composer.focus();
paint();
