/** The websocket: opened when it is needed, opened again after a loss, and silent about both while nobody waits. */

import { backoffMs, openFrame, parseFrame, pingFrame, reconnectsAfter } from './frames.js';

const ATTEMPTS = 3; // for a message that waits; after them the person decides

/** Events: `event` with the site's event in `detail`, `lost` when the socket closed or cannot be opened. */
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

  constructor(url, pingIntervalS) {
    super();
    this.#url = url;
    this.#pingMs = pingIntervalS * 1000;
    addEventListener('online', () => this.#waiting && this.connect());
  }

  /** The model of the session; another one takes another session, which is opened when it is needed. */
  set model(name) {
    if (name === this.#model) return;
    this.#model = name;
    const socket = this.#socket;
    this.#forget();
    socket?.close(1000);
  }

  #forget() {
    clearInterval(this.#pingTimer);
    clearTimeout(this.#retryTimer);
    this.#socket = null;
    this.#isOpened = false;
  }

  /** Open the socket unless it is open or being opened. */
  connect() {
    if (this.#socket) return;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = 0;
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    socket.addEventListener('open', () => socket.send(openFrame(this.#model)));
    socket.addEventListener('message', ({ data }) => this.#onMessage(socket, data));
    socket.addEventListener('close', ({ code }) => this.#onClose(socket, code));
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

  #onMessage(socket, data) {
    const event = parseFrame(data);
    if (socket !== this.#socket || !event || event.type === 'pong') return;
    if (event.type === 'opened') {
      this.#isOpened = true;
      this.#attempt = 0;
      this.#pingTimer = setInterval(() => socket.send(pingFrame()), this.#pingMs);
      if (this.#waiting) socket.send(this.#waiting);
      this.#waiting = null;
    } else if (event.type === 'error' && !this.#isOpened) {
      this.#waiting = null;
      socket.close(1000); // the answer to open: there is no session to go on with
    }
    this.dispatchEvent(new CustomEvent('event', { detail: event }));
  }

  #onClose(socket, code) {
    if (socket !== this.#socket) return;
    const wasOpened = this.#isOpened;
    clearInterval(this.#pingTimer);
    this.#socket = null;
    this.#isOpened = false;
    if (this.#waiting && this.#attempt < ATTEMPTS) return this.#retry();
    const wasWaiting = this.#waiting !== null;
    this.#waiting = null;
    this.dispatchEvent(new CustomEvent('lost', { detail: { code, wasOpened, wasWaiting } }));
    if (wasOpened && reconnectsAfter(code)) this.#retry();
  }

  #retry() {
    if (this.#attempt >= ATTEMPTS) return;
    this.#retryTimer = setTimeout(() => this.connect(), backoffMs(this.#attempt, Math.random()));
    this.#attempt += 1;
  }
}
