/**
 * The way between an embedded chat and the page around it. Messages are taken from that page alone, and go to it alone, by
 * the name of its origin, which has to be one of the key's. On its own in a window the chat has nobody to talk to.
 *
 * The browser tells who is around where it can (`ancestorOrigins`); elsewhere the page's `hello` does.
 */

import { isFromParent, message, readMessage } from './messages.js';

/** Event `message` with what the page said in `detail`. */
export class Bridge extends EventTarget {
  #origins;
  #origin = null; // of the page around, once it is known to be allowed
  isReady = false;

  constructor(origins) {
    super();
    this.#origins = origins;
    if (!this.isEmbedded) return;
    const around = location.ancestorOrigins?.[0];
    if (origins.includes(around)) this.#origin = around;
    addEventListener('message', (event) => this.#hear(event));
  }

  get isEmbedded() {
    return window.parent !== window;
  }

  /** Tell the page that it may talk now. */
  ready() {
    this.isReady = true;
    this.post('ready');
  }

  post(type, values) {
    if (this.isReady && this.#origin) window.parent.postMessage(message(type, values), this.#origin);
  }

  #hear(event) {
    const found = isFromParent(event, window.parent, this.#origins) ? readMessage(event.data) : null;
    if (!found) return;
    const isNew = this.#origin !== event.origin;
    this.#origin = event.origin;
    if (found.type !== 'hello') this.dispatchEvent(new CustomEvent('message', { detail: found }));
    else if (isNew) this.post('ready');
  }
}
