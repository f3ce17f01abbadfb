/** The message field: grows with its text, sends on Enter unless an input method is composing. */

import { byId } from './dom.js';

export class Composer {
  #field = byId('prompt');
  #send = byId('send');
  #stop = byId('stop');
  #isGenerating = false;

  /** @param {{onSend: (text: string) => void, onStop: () => void, onType: () => void}} handlers */
  constructor({ onSend, onStop, onType }) {
    const submit = () => {
      const text = this.#field.value.trim();
      if (!text || this.#isGenerating) return;
      this.#field.value = '';
      this.#adjust();
      onSend(text);
    };
    byId('composer').addEventListener('submit', (event) => {
      event.preventDefault();
      submit();
    });
    this.#field.addEventListener('keydown', (event) => {
      // 229 is what browsers send while an input method is open, some of them without isComposing.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      submit();
    });
    this.#field.addEventListener('input', () => {
      this.#adjust();
      onType();
    });
    this.#stop.addEventListener('click', () => {
      onStop();
      this.focus();
    });
    addEventListener('resize', () => this.#adjust());
    this.#field.disabled = false; // the template's, for those who type before there is anybody to read it
    this.#adjust();
  }

  get isEmpty() {
    return this.#field.value === '';
  }

  focus() {
    this.#field.focus({ preventScroll: true });
  }

  set isGenerating(value) {
    if (value === this.#isGenerating) return;
    this.#isGenerating = value;
    const hadFocus = document.activeElement === this.#stop || document.activeElement === this.#send;
    this.#send.hidden = value;
    this.#stop.hidden = !value;
    if (hadFocus) this.focus();
    this.#adjust();
  }

  #adjust() {
    this.#send.disabled = this.#field.value.trim() === '';
    this.#field.style.height = 'auto';
    this.#field.style.height = `${this.#field.scrollHeight}px`;
  }
}
