/** Conversations in this browser's IndexedDB; in memory, for as long as the page lives, where storage is refused. */

const STORE = 'conversations';

function done(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener('success', () => resolve(request.result));
    request.addEventListener('error', () => reject(request.error));
  });
}

function openDatabase(name) {
  const request = indexedDB.open(name, 1);
  request.addEventListener('upgradeneeded', () => request.result.createObjectStore(STORE, { keyPath: 'id' }));
  return done(request);
}

/** Records with an `id`: all of them, put, delete, clear. */
export class Database {
  #name;
  #database = null;
  #kept = new Map();

  constructor(name = 'umbel') {
    this.#name = name;
  }

  /** Whether records outlive the page. */
  get isLasting() {
    return this.#database !== null;
  }

  /** Return all records. */
  async open() {
    try {
      this.#database = await openDatabase(this.#name);
      // Another tab with a later version of the page wants to change the database: this one goes on in memory.
      this.#database.addEventListener('versionchange', () => this.#giveUp());
      return await this.#run('readonly', (store) => store.getAll());
    } catch {
      this.#giveUp();
      return [];
    }
  }

  put(record) {
    this.#kept.set(record.id, record);
    return this.#write((store) => store.put(record));
  }

  delete(id) {
    this.#kept.delete(id);
    return this.#write((store) => store.delete(id));
  }

  clear() {
    this.#kept.clear();
    return this.#write((store) => store.clear());
  }

  /** Return the record as it was written last, or undefined. */
  async get(id) {
    if (!this.#database) return this.#kept.get(id);
    return this.#run('readonly', (store) => store.get(id)).catch(() => this.#kept.get(id));
  }

  async #write(action) {
    if (this.#database) await this.#run('readwrite', action).catch(() => this.#giveUp()); // full, or taken away
  }

  #run(mode, action) {
    const transaction = this.#database.transaction(STORE, mode);
    const request = action(transaction.objectStore(STORE));
    transaction.commit(); // now, and not once the page has looked at the result: it may be about to go
    return done(request);
  }

  #giveUp() {
    this.#database?.close();
    this.#database = null;
  }
}
