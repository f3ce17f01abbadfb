/** The chat in a frame on another page: the chat page's own parts around one conversation, and the bridge to that page. */

import { Chat } from '../chat.js';
import { Composer } from '../composer.js';
import { Connection } from '../connection.js';
import { byId } from '../dom.js';
import { t } from '../i18n.js';
import { Library } from '../library.js';
import { reportAnswer } from '../report.js';
import { Follower } from '../scroll.js';
import { Transcript } from '../transcript.js';
import { lastShown } from '../conversation.js';
import { Bridge } from './bridge.js';
import { Look } from './look.js';
import { Pass } from './pass.js';

const WELCOME_PX = 220; // what the welcome needs
const KEEP_MS = 24 * 3600 * 1000; // a chat is gone on with for so long; nobody would look for it later, or should
const REFUSALS = new Set(['embed_expired', 'embed_closed']);

const config = JSON.parse(byId('config').textContent);
const bridge = new Bridge([...config.origins, location.origin]);
const look = new Look({ ...config, isEmbedded: bridge.isEmbedded });
const library = new Library(`umbel-embed-${config.key}`);
await Promise.all([look.speak(), library.open()]);

let isShown = !look.canClose;
let isPaintDue = false;
let wasGenerating = false;
let numUnread = 0;
let context = '';
let height = 0;

const say = (text) => (byId('status').textContent = text);
const follower = new Follower(byId('scroller'), byId('to-end'));
const socketUrl = new URL(config.socket_path, location.href);
socketUrl.protocol = location.protocol === 'https:' ? 'wss:' : 'ws:';
const connection = new Connection(socketUrl.href, config.ping_interval_s);
const pass = new Pass(config.token_path, config.token, config.token_life_s);
connection.embedToken = () => pass.get();
connection.addEventListener('event', ({ detail }) => REFUSALS.has(detail.code) && pass.drop());

const chat = new Chat({ connection, library, params: () => ({}), maxFrameBytes: config.max_frame_bytes, say });
const onCopied = (isCopied) => say(t(isCopied ? 'status.copied' : 'status.copy_refused'));
const report = config.reports ? (told) => reportAnswer({ ...told, say }) : null;
const transcript = new Transcript({ chat, onCopied, onNew: newChat, report });
const composer = new Composer({ onSend: (text) => chat.send(text), onStop: () => chat.stop(), onType: () => connection.connect() });

chat.addEventListener('change', () => {
  if (wasGenerating && !chat.isGenerating) onEnd();
  wasGenerating = chat.isGenerating;
  paintSoon();
});
chat.addEventListener('start', () => {
  follower.toEnd();
  bridge.post('event', { name: 'sent' });
});

function onEnd() {
  bridge.post('event', { name: lastShown(chat.conversation)?.state === 'failed' ? 'failed' : 'answered' });
  if (isShown) return;
  numUnread += 1;
  bridge.post('unread', { count: numUnread });
}

/** Begin anew; the chat before is forgotten, since nothing here would lead back to it. */
function newChat() {
  const before = chat.conversation.id;
  chat.open(library.create({ system: context }));
  library.delete(before);
  transcript.clear();
  say(t('chat.new'));
  composer.focus();
}

function paintSoon() {
  if (isPaintDue) return;
  isPaintDue = true;
  requestAnimationFrame(paint);
}

function paint() {
  isPaintDue = false;
  const isEmpty = chat.conversation.messages.length === 0;
  transcript.paint();
  byId('welcome').hidden = !isEmpty;
  byId('new-chat').hidden = isEmpty;
  composer.isGenerating = chat.isGenerating;
  follower.follow();
  tellHeight();
}

/** Tell a page that shows the chat in its text how much room it would fill. */
function tellHeight() {
  if (!look.isInline) return;
  const heightOf = (element) => element.offsetHeight;
  const inside = byId('welcome').hidden ? heightOf(byId('messages')) + heightOf(byId('alerts')) : WELCOME_PX;
  const now = Math.ceil(heightOf(document.querySelector('.topbar')) + inside + heightOf(document.querySelector('.dock')));
  if (now === height || !bridge.isReady) return;
  height = now;
  bridge.post('resize', { height });
}

const actions = {
  open() {
    isShown = true;
    if (numUnread) bridge.post('unread', { count: (numUnread = 0) });
    composer.focus();
  },
  close: () => (isShown = false),
  async set(detail) {
    if (await look.set(detail.look)) transcript.clear();
    paintSoon();
  },
  prefill({ text }) {
    byId('prompt').value = text;
    byId('prompt').dispatchEvent(new Event('input'));
    composer.focus();
  },
  send({ text }) {
    if (chat.isGenerating) this.prefill({ text });
    else chat.send(text);
  },
  context({ text }) {
    context = text;
    chat.set({ system: text });
  },
};

bridge.addEventListener('message', ({ detail }) => actions[detail.type](detail));
byId('new-chat').addEventListener('click', newChat);
byId('close').addEventListener('click', () => bridge.post('close'));
addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.isComposing || document.querySelector('dialog[open]')) return;
  if (chat.isGenerating) chat.stop();
  else if (look.canClose) bridge.post('close');
});
new ResizeObserver(() => {
  follower.follow(); // formulas and colours come after the text
  tellHeight();
}).observe(byId('messages'));

for (const { id, updatedMs } of library.all()) if (Date.now() - updatedMs > KEEP_MS) library.delete(id);
// What another page said of itself is not for this one.
chat.open({ ...(library.all()[0] ?? library.create()), system: '' }, { canResume: true });
paint();
bridge.ready();
tellHeight();
