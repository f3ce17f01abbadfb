/** All conversations of this browser: read once, written a moment after they change. */

import { emptyConversation } from './conversation.js';
import { Database } from './db.js';

const WRITE_MS = 800; // while an answer streams; what a crash may lose

/** Event `change` when the list, a name or a conversation's text changed. */
export class Library extends EventTarget {
  #database;
  #records = new Map();
  #dirty = new Map();
  #timer = 0;

  /** `name` is the database's, where it is not the chat page's. */
  constructor(name) {
    super();
    this.#database = new Database(name);
  }

  async open() {
    for (const record of await this.#database.open()) this.#records.set(record.id, record);
    addEventListener('pagehide', () => this.flush());
    addEventListener('visibilitychange', () => document.visibilityState === 'hidden' && this.flush());
  }

  get isLasting() {
    return this.#database.isLasting;
  }

  /** Return all conversations, the one changed last in front. */
  all() {
    return [...this.#records.values()].sort((one, other) => other.updatedMs - one.updatedMs);
  }

  get(id) {
    return this.#records.get(id) ?? null;
  }

  /** Return a conversation that is kept as soon as it is put. */
  create({ system = '', isTemporary = false } = {}) {
    const now = Date.now();
    return { ...emptyConversation(), id: crypto.randomUUID(), name: '', createdMs: now, updatedMs: now, system, isTemporary };
  }

  /** Keep a conversation as it is now, unless it is temporary; `isUrgent` where a reload must find just that. */
  put(record, isUrgent = false) {
    if (record.isTemporary || record === this.#records.get(record.id)) return;
    const isNew = !this.#records.has(record.id);
    this.#records.set(record.id, record);
    this.#dirty.set(record.id, record);
    if (isUrgent) this.flush();
    else this.#timer ||= setTimeout(() => this.flush(), WRITE_MS);
    if (isNew || isUrgent) this.#tell();
  }

  rename(id, name) {
    const record = this.get(id);
    if (record) this.put({ ...record, name }, true);
  }

  /** Write what is not written yet. */
  flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    for (const record of this.#dirty.values()) this.#database.put(record);
    this.#dirty.clear();
  }

  delete(id) {
    this.#records.delete(id);
    this.#dirty.delete(id);
    this.#database.delete(id);
    this.#tell();
  }

  clear() {
    this.#records.clear();
    this.#dirty.clear();
    this.#database.clear();
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event('change'));
  }
}
