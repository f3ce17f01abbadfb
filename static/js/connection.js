/**
 * The websocket: opened when it is needed, opened again after a loss, and silent about both while nobody waits.
 *
 * A session is opened with a token. When the socket is lost in the middle of an answer, or nothing came for so long that it
 * must be, the next one resumes that session from the first frame that did not come; if the site cannot, a new session is
 * opened on it. The token stays with the tab, so that a reload can do the same.
 */

import { backoffMs, byeFrame, openFrame, parseFrame, pingFrame, reconnectsAfter, resumeFrame } from './frames.js';

const ATTEMPTS = 3; // for a message that waits; after them the person decides
const RESUME_ATTEMPTS = 5; // about half a minute, which is how long the site goes on without us
const SILENT_MS = 20_000; // the site sends a heartbeat every 5 s while it generates
const KEY = 'umbel-session';

function keep(session) {
  try {
    if (session) sessionStorage.setItem(KEY, JSON.stringify(session));
    else sessionStorage.removeItem(KEY);
  } catch {
    // storage may be forbidden; a reload then begins anew
  }
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? 'null');
  } catch {
    return null;
  }
}

/**
 * Events: `event` with the site's event in `detail`; `reconnecting` when the socket was lost in the middle of an answer; `lost`
 * when it closed, or cannot be opened, for good.
 */
export class Connection extends EventTarget {
  #url;
  #pingMs;
  #model = null;
  #socket = null;
  #isOpened = false;
  #waiting = null; // the frame to send once opened
  #attempt = 0;
  #retryTimer = 0;
  #pingTimer = 0;
  #token = null;
  #heardMs = 0;

  /** Tells {id, fromSeq} of the answer that is awaited and the first of its frames that did not come, or null. */
  awaited = () => null;

  /** Gives the token that a page which is embedded elsewhere has to show. */
  embedToken = async () => null;

  constructor(url, pingIntervalS) {
    super();
    this.#url = url;
    this.#pingMs = pingIntervalS * 1000;
    const look = () => document.visibilityState === 'visible' && this.#reconcile(true);
    addEventListener('online', look);
    addEventListener('visibilitychange', look);
    setInterval(() => this.#reconcile(false), 2000);
  }

  /** The model of the session; another one takes another session, which is opened when it is needed. */
  set model(name) {
    if (name === this.#model) return;
    this.#model = name;
    this.#token = null;
    if (this.#isOpened) this.#socket.send(byeFrame());
    this.#drop();
  }

  /** Open the socket unless it is open or being opened. */
  connect() {
    if (this.#socket) return;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = 0;
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    this.#heardMs = Date.now();
    socket.addEventListener('open', () => {
      const awaited = this.#canResume() ? this.awaited() : null;
      if (awaited) socket.send(resumeFrame(this.#token, awaited));
      else this.#openSession(socket);
    });
    socket.addEventListener('message', ({ data }) => this.#onMessage(socket, data));
    socket.addEventListener('close', ({ code }) => this.#onClose(socket, code));
  }

  /** Take up the session that this tab had before it was loaded anew; return whether there was one. */
  resume() {
    const session = kept();
    if (this.#socket || session?.model !== this.#model || typeof session.token !== 'string') return false;
    this.#token = session.token;
    this.connect();
    return true;
  }

  /** Send a frame as soon as the session is open; one at a time may wait. */
  send(frame) {
    if (this.#isOpened) return this.#socket.send(frame);
    this.#waiting = frame;
    this.#attempt = 0;
    this.connect();
  }

  /** Send a frame if there is anybody to read it, and forget one that waits; return whether it was sent. */
  sendNow(frame) {
    this.#waiting = null;
    if (this.#isOpened) this.#socket.send(frame);
    return this.#isOpened;
  }

  async #openSession(socket) {
    const embed = await this.embedToken();
    if (socket === this.#socket) socket.send(openFrame(this.#model, embed));
  }

  #canResume() {
    return this.#token !== null && this.#waiting === null && this.awaited() !== null;
  }

  #onMessage(socket, data) {
    const event = parseFrame(data);
    if (socket !== this.#socket || !event) return;
    this.#heardMs = Date.now();
    if (event.type === 'pong' || event.type === 'heartbeat') return;
    if (event.type === 'opened') {
      this.#token = event.resume_token ?? null;
      keep(this.#token ? { token: this.#token, model: this.#model } : null);
      this.#opened(socket);
    } else if (event.type === 'resumed') {
      if (event.resumed) this.#opened(socket);
      else {
        this.#token = null;
        this.#openSession(socket);
      }
    } else if (event.type === 'error' && !this.#isOpened) {
      this.#waiting = null;
      socket.close(1000); // the answer to open: there is no session to go on with
    }
    this.dispatchEvent(new CustomEvent('event', { detail: event }));
  }

  #opened(socket) {
    this.#isOpened = true;
    this.#attempt = 0;
    clearInterval(this.#pingTimer);
    this.#pingTimer = setInterval(() => socket.send(pingFrame()), this.#pingMs);
    if (this.#waiting) socket.send(this.#waiting);
    this.#waiting = null;
  }

  #onClose(socket, code) {
    if (socket !== this.#socket) return;
    const wasOpened = this.#isOpened;
    this.#forget();
    if (this.#canResume() && reconnectsAfter(code) && this.#attempt < RESUME_ATTEMPTS) {
      this.dispatchEvent(new Event('reconnecting'));
      return this.#retry(RESUME_ATTEMPTS);
    }
    if (this.#waiting && this.#attempt < ATTEMPTS) return this.#retry(ATTEMPTS);
    const wasWaiting = this.#waiting !== null;
    this.#waiting = null;
    this.dispatchEvent(new CustomEvent('lost', { detail: { code, wasOpened, wasWaiting } }));
    if (wasOpened && reconnectsAfter(code)) this.#retry(ATTEMPTS);
  }

  #retry(attempts) {
    if (this.#attempt >= attempts) return;
    this.#retryTimer = setTimeout(() => this.connect(), backoffMs(this.#attempt, Math.random()));
    this.#attempt += 1;
  }

  /** Look whether what is awaited can still come; `isNow` when the network or the person came back. */
  #reconcile(isNow) {
    if (this.#socket === null) {
      if (isNow && (this.#retryTimer || this.#waiting)) this.connect();
      return;
    }
    if (!this.#canResume() || Date.now() - this.#heardMs < SILENT_MS) return;
    this.#drop(); // a socket that died without a word
    this.dispatchEvent(new Event('reconnecting'));
    this.connect();
  }

  #drop() {
    const socket = this.#socket;
    this.#forget();
    socket?.close(1000);
  }

  #forget() {
    clearInterval(this.#pingTimer);
    clearTimeout(this.#retryTimer);
    this.#retryTimer = 0;
    this.#socket = null;
    this.#isOpened = false;
  }
}
