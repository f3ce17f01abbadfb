/** The list of conversations: beside the chat on wide windows, a drawer over it on narrow ones. */

import { byId, h } from './dom.js';
import { confirmDialog, promptDialog } from './dialogs.js';
import { dateText, t } from './i18n.js';
import { iconButton } from './message-actions.js';
import { search, titleOf } from './search.js';

const KEY = 'umbel-sidebar';
const NARROW = '(max-width: 56rem)';

/** Return whether the list was closed when it was last used beside the chat. */
function wasClosed() {
  try {
    return localStorage.getItem(KEY) === 'closed';
  } catch {
    return false; // storage may be forbidden
  }
}

export class Sidebar {
  #library;
  #currentId;
  #onDelete;
  #onRename;
  #say;
  #element = byId('sidebar');
  #toggle = byId('sidebar-toggle');
  #field = byId('search');
  #narrow = matchMedia(NARROW);
  #isDue = false;

  /**
   * `currentId()` tells which conversation is shown; `onRename(id, name)` gives one a name; `onDelete(id)` is called before
   * one is deleted, with null for all; `say` is told what a screen reader should read.
   */
  constructor({ library, currentId, onRename, onDelete, say }) {
    this.#library = library;
    this.#currentId = currentId;
    this.#onRename = onRename;
    this.#onDelete = onDelete;
    this.#say = say;
    this.#field.addEventListener('input', () => this.#say(t('sidebar.found', { count: this.paint() })));
    this.#toggle.addEventListener('click', () => this.toggle());
    byId('sidebar-close').addEventListener('click', () => this.toggle(false));
    byId('backdrop').addEventListener('click', () => this.toggle(false));
    byId('delete-all').addEventListener('click', () => this.#deleteAll());
    this.#element.addEventListener('keydown', (event) => this.#onKey(event));
    this.#narrow.addEventListener('change', () => this.#show(!this.#narrow.matches && !wasClosed()));
    library.addEventListener('change', () => this.paintSoon());
    this.#show(!this.#narrow.matches && !wasClosed());
  }

  get isOpen() {
    return !this.#element.hidden;
  }

  /** Open or close; where the list covers the chat, the focus goes along. */
  toggle(isOpen = !this.isOpen) {
    if (isOpen === this.isOpen) return;
    this.#show(isOpen);
    if (this.#narrow.matches) (isOpen ? byId('sidebar-close') : this.#toggle).focus();
    else {
      try {
        localStorage.setItem(KEY, isOpen ? 'open' : 'closed');
      } catch {
        // storage may be forbidden; the choice then lasts as long as the page
      }
    }
  }

  /** Open, with the focus on the search. */
  find() {
    this.toggle(true);
    this.#field.focus();
    this.#field.select();
  }

  /** Close where it covers the chat. */
  makeRoom() {
    if (this.#narrow.matches && this.isOpen) this.#show(false);
  }

  paintSoon() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      this.paint();
    });
  }

  /** Paint the list; return how many conversations it has. */
  paint() {
    const all = this.#library.all();
    const found = search(all, this.#field.value);
    const focused = document.activeElement?.closest?.('#chats li')?.dataset.id;
    byId('chats').replaceChildren(...found.map(({ record, excerpt }) => this.#item(record, excerpt)));
    if (focused) byId('chats').querySelector(`[data-id="${focused}"] a`)?.focus();
    byId('chats-none').textContent = found.length ? '' : t(all.length ? 'sidebar.nothing_found' : 'sidebar.empty');
    byId('chats-memory').hidden = this.#library.isLasting;
    byId('export-json').disabled = byId('delete-all').disabled = all.length === 0;
    return found.length;
  }

  #item(record, excerpt) {
    const title = titleOf(record) || t('chat.new');
    const isCurrent = record.id === this.#currentId();
    const detail = excerpt || dateText(record.updatedMs, Date.now());
    const link = h('a', { href: `#${record.id}`, 'aria-current': isCurrent ? 'page' : null }, h('span', { class: 'chat-title', dir: 'auto' }, title), h('span', { class: 'chat-detail', dir: 'auto' }, detail));
    const rename = iconButton('edit', t('sidebar.rename', { title }), () => this.#rename(record, title));
    const remove = iconButton('delete', t('sidebar.delete', { title }), () => this.#delete(record, title));
    return h('li', { 'data-id': record.id }, link, rename, remove);
  }

  async #rename(record, title) {
    const name = await promptDialog({ title: t('rename.title'), label: t('rename.label'), value: title, action: t('rename.action') });
    if (name !== null) this.#onRename(record.id, name);
  }

  async #delete(record, title) {
    if (!(await confirmDialog({ title: t('delete.title'), text: t('delete.text', { title }), action: t('delete.action') }))) return;
    this.#onDelete(record.id);
    this.#library.delete(record.id);
    this.#field.focus();
  }

  async #deleteAll() {
    const count = this.#library.all().length;
    if (!(await confirmDialog({ title: t('delete_all.title'), text: t('delete_all.text', { count }), action: t('delete.action') }))) return;
    this.#onDelete(null);
    this.#library.clear();
  }

  #show(isOpen) {
    this.#element.hidden = !isOpen;
    this.#toggle.setAttribute('aria-expanded', String(isOpen));
    byId('backdrop').hidden = !isOpen || !this.#narrow.matches;
    byId('page').inert = isOpen && this.#narrow.matches;
  }

  #onKey(event) {
    if (event.key === 'Escape' && this.#narrow.matches) {
      event.stopPropagation();
      return this.toggle(false);
    }
    if (event.key !== 'ArrowDown' && event.key !== 'ArrowUp') return;
    const links = [this.#field, ...byId('chats').querySelectorAll('a')];
    const next = links[links.indexOf(document.activeElement) + (event.key === 'ArrowDown' ? 1 : -1)];
    if (!links.includes(document.activeElement) || !next) return;
    event.preventDefault();
    next.focus();
  }
}
