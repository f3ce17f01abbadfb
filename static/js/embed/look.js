/** How an embedded chat looks: as the page around says, else as its key does, else as the system does. */

import { byId } from '../dom.js';
import { t } from '../i18n.js';
import { setLanguage } from '../language.js';
import { accentColours } from './accent.js';
import { readLook } from './messages.js';

export class Look {
  #languages;
  #keyTheme;
  #isEmbedded;
  #wanted;
  #lang;
  #system = matchMedia('(prefers-color-scheme: dark)');

  /** `theme` is the key's. The address says how to begin, so that nothing changes before the reader's eyes. */
  constructor({ languages, theme, isEmbedded }) {
    this.#languages = languages;
    this.#keyTheme = theme;
    this.#isEmbedded = isEmbedded;
    this.#wanted = readLook(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
    this.#system.addEventListener('change', () => this.#paint());
    this.#paint();
  }

  /** Whether the chat stands in the page's text, instead of above it. */
  get isInline() {
    return this.#wanted.mode === 'inline';
  }

  /** Whether there is something that can be closed. */
  get canClose() {
    return this.#isEmbedded && this.#wanted.mode === 'bubble';
  }

  /** Take what the page says; return whether the language is another one now. */
  async set(look) {
    const mode = look.mode ?? this.#wanted.mode;
    this.#wanted = { ...look, mode };
    this.#paint();
    const isNew = await this.speak();
    this.label();
    return isNew;
  }

  /** Load the language; return whether it is another one than before. */
  async speak() {
    if (this.#lang === this.#wanted.lang) return false;
    this.#lang = this.#wanted.lang;
    await setLanguage(this.#languages, this.#lang, { isChoice: false });
    this.label();
    return true;
  }

  /** Write the heading, which is the page's own if it gave one. */
  label() {
    byId('heading').textContent = this.#wanted.heading ?? t('embed.title');
  }

  #paint() {
    const theme = this.#wanted.theme ?? this.#keyTheme;
    const root = document.documentElement;
    if (theme === 'auto') delete root.dataset.theme;
    else root.dataset.theme = theme;
    const shown = theme === 'auto' ? (this.#system.matches ? 'dark' : 'light') : theme;
    const colours = this.#wanted.accent ? accentColours(this.#wanted.accent, shown) : { '--accent': '', '--accent-strong': '', '--on-accent': '' };
    for (const [name, value] of Object.entries(colours)) root.style.setProperty(name, value);
    byId('close').hidden = !this.canClose;
  }
}
