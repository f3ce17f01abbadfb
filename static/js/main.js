/** The chat page: puts its parts together, and paints at most once a frame. */

import { answerOf, Chat } from './chat.js';
import { Composer } from './composer.js';
import { Connection } from './connection.js';
import { contextUse } from './conversation.js';
import { byId } from './dom.js';
import { showShortcuts } from './dialogs.js';
import { setUpFiles } from './files.js';
import { t } from './i18n.js';
import { setLanguage } from './language.js';
import { Library } from './library.js';
import { copyText } from './message-actions.js';
import { Follower } from './scroll.js';
import { reportAnswer } from './report.js';
import { Settings } from './settings.js';
import { shortcutOf } from './shortcuts.js';
import { Sidebar } from './sidebar.js';
import { Swarm } from './swarm.js';
import { contextText, modelText, stateText } from './texts.js';
import { applyKeptTheme, setUpTheme } from './theme.js';
import { Transcript } from './transcript.js';
import { path } from './tree.js';

applyKeptTheme();
const config = JSON.parse(byId('config').textContent);
const library = new Library();
await Promise.all([setLanguage(config.languages), library.open()]);
const swarm = new Swarm(config.models);

let maxLength = 0;
let isPaintDue = false;
let paintedId = null;

const say = (text) => (byId('status').textContent = text);
const follower = new Follower(byId('scroller'), byId('to-end'));
const socketUrl = new URL(config.socket_path, location.href);
socketUrl.protocol = location.protocol === 'https:' ? 'wss:' : 'ws:';
const connection = new Connection(socketUrl.href, config.ping_interval_s);
const settings = new Settings({
  languages: config.languages,
  handlers: {
    current: () => ({ model: modelId, system: chat.conversation.messages.length ? chat.conversation.system : settings.system, isBusy: chat.isGenerating }),
    onModel: useModel,
    onSystem: (system) => chat.set({ system }),
    onLanguage: changeLanguage,
    onOpen() {
      connection.connect(); // tells limits and defaults
      swarm.look();
      settings.showModels(swarm.models);
    },
  },
});
let modelId = (swarm.get(settings.model) ?? swarm.models[0])?.id ?? null;
connection.model = modelId;
const chat = new Chat({ connection, library, params: () => settings.params, maxFrameBytes: config.max_frame_bytes, say });
const onCopied = (isCopied) => say(t(isCopied ? 'status.copied' : 'status.copy_refused'));
const report = config.reports ? (told) => reportAnswer({ ...told, model: modelId, say }) : null;
const transcript = new Transcript({ chat, onCopied, onNew: () => newChat(), report });
const sidebar = new Sidebar({ library, currentId: () => chat.conversation.id, onRename, onDelete, say });
setUpFiles({ library, current: () => chat.conversation, say, onImported: () => show(library.get(chat.conversation.id)) });

chat.addEventListener('change', paintSoon);
chat.addEventListener('start', () => {
  follower.toEnd();
  if (!chat.conversation.isTemporary && location.hash !== `#${chat.conversation.id}`) history.replaceState(null, '', `#${chat.conversation.id}`);
});
connection.addEventListener('event', ({ detail: event }) => {
  if (event.type !== 'opened' && !event.resumed) return;
  maxLength = event.limits?.max_length ?? maxLength;
  settings.site = event;
  paintSoon();
});

function newChat({ isTemporary = false } = {}) {
  if (location.hash) history.pushState(null, '', location.pathname + location.search);
  chat.open(library.create({ isTemporary, system: settings.system }));
  say(t(isTemporary ? 'temporary.note' : 'chat.new'));
  sidebar.makeRoom();
  composer.focus();
}

/** Show the conversation that the address names, or an empty one. */
function openFromAddress() {
  const record = library.get(location.hash.slice(1));
  if (record?.id === chat.conversation.id) return;
  chat.open(record ?? library.create({ system: settings.system }), { canResume: true });
  sidebar.makeRoom();
}

function useModel(id) {
  modelId = id;
  maxLength = 0;
  connection.model = id;
  paintSoon();
}

async function changeLanguage(name) {
  await setLanguage(config.languages, name);
  clear(chat.conversation.id);
  settings.repaint();
  settings.showModels(swarm.models);
  theme.label();
  paint();
}

/** Show what an import changed. */
function show(record) {
  if (record && record !== chat.conversation && !chat.isGenerating) chat.open(record);
}

function onRename(id, name) {
  if (id === chat.conversation.id) chat.set({ name });
  else library.rename(id, name);
}

function onDelete(id) {
  if (id === null || id === chat.conversation.id) newChat();
}

function paintSoon() {
  if (isPaintDue) return;
  isPaintDue = true;
  requestAnimationFrame(paint);
}

function paint() {
  isPaintDue = false;
  const { conversation } = chat;
  if (conversation.id !== paintedId) clear(conversation.id);
  transcript.paint();
  byId('welcome').hidden = conversation.messages.length > 0;
  byId('temporary').setAttribute('aria-pressed', String(conversation.isTemporary));
  byId('temporary-note').hidden = !conversation.isTemporary;
  byId('export-markdown').disabled = conversation.messages.length === 0;
  composer.isGenerating = chat.isGenerating;
  const model = swarm.get(modelId);
  byId('model-name').textContent = model ? modelText(model.id) : t('page.no_model');
  byId('model-button').title = model ? `${model.id}: ${stateText(model)}` : '';
  byId('model-dot').dataset.status = model?.status ?? 'failed';
  swarm.paintNote(model, config.initial_peers, answerOf(conversation)?.outcome?.timings?.tokens_per_s);
  const use = contextUse(conversation, maxLength || lengthOf(model));
  byId('context').hidden = use === null;
  if (use) {
    byId('context-meter').value = use.used / use.max;
    byId('context-text').textContent = contextText(use);
  }
  follower.follow();
}

/** Return the longest chat that a model is known to take before the session is open. */
function lengthOf(model) {
  return model?.context_length ? Math.min(model.context_length, config.session_max_length) : 0;
}

function clear(id) {
  paintedId = id;
  transcript.clear();
  sidebar.paintSoon();
  follower.toEnd();
}

byId('shortcuts-open').addEventListener('click', () => {
  byId('settings').close();
  showShortcuts();
});
byId('new-chat').addEventListener('click', () => newChat());
byId('temporary').addEventListener('click', () => newChat({ isTemporary: !chat.conversation.isTemporary }));
addEventListener('hashchange', openFromAddress);
addEventListener('popstate', openFromAddress);
const actions = {
  new: () => newChat(),
  search: () => sidebar.find(),
  sidebar: () => sidebar.toggle(),
  stop: () => chat.stop(),
  compose: () => composer.focus(),
  copy: () => copyLast(path(chat.conversation).findLast(({ role }) => role === 'assistant')?.content),
  copy_code: () => copyLast([...document.querySelectorAll('.assistant pre code')].at(-1)?.textContent),
  edit: () => editLast(),
  list: showShortcuts,
};

addEventListener('keydown', (event) => {
  const name = shortcutOf(event);
  if (!name || document.querySelector('dialog[open]')) return;
  if (name === 'edit' && (event.target !== byId('prompt') || !composer.isEmpty)) return;
  if (name === 'stop' && !chat.isGenerating) return;
  event.preventDefault();
  actions[name]();
});

async function copyLast(text) {
  if (text) onCopied(await copyText(text));
}

function editLast() {
  const last = path(chat.conversation).findLast(({ role }) => role === 'user');
  if (last && !chat.isGenerating) transcript.edit(last.key);
}

// Where a keyboard on the screen covers the page instead of making it smaller.
visualViewport?.addEventListener('resize', () => {
  const isZoomed = visualViewport.scale > 1.01;
  document.documentElement.style.setProperty('--viewport', isZoomed ? '100dvh' : `${Math.round(visualViewport.height)}px`);
});
const theme = setUpTheme(byId('theme'));
swarm.addEventListener('change', () => {
  settings.showModels(swarm.models);
  paintSoon();
});
setTimeout(() => swarm.look(), 1000); // what the page came with is as good as new
const composer = new Composer({ onSend: (text) => chat.send(text), onStop: () => chat.stop(), onType: () => connection.connect() });
openFromAddress();
sidebar.paint();
if (matchMedia('(pointer: fine)').matches) composer.focus();
paint();
