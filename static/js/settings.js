/** The settings: model, system prompt, sampling, language; kept in this browser and used from the next message on. */

import { byId, h } from './dom.js';
import { currentLanguage, languageName, t, wholeText } from './i18n.js';
import { fields, readField, toParams } from './params.js';
import { modelText, stateText } from './texts.js';

const KEY = 'umbel-settings';

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? '{}');
    return found && typeof found === 'object' ? found : {};
  } catch {
    return {}; // storage may be forbidden, or hold what an other version wrote
  }
}

export class Settings {
  #kept = read();
  #dialog = byId('settings');
  #handlers;
  #limits = {};
  #defaults = {};

  /**
   * Handlers: `onModel(id)`, `onSystem(text)`, `onLanguage(name)`, `onOpen()`, and `current()`, which tells {model, system,
   * isBusy}.
   */
  constructor({ languages, handlers }) {
    this.#handlers = handlers;
    byId('settings-open').addEventListener('click', () => this.open());
    byId('model-button').addEventListener('click', () => this.open());
    byId('settings-close').addEventListener('click', () => this.#dialog.close());
    byId('settings-reset').addEventListener('click', () => this.#reset());
    byId('system').addEventListener('change', () => {
      this.#keep({ system: byId('system').value });
      handlers.onSystem(byId('system').value);
    });
    const select = byId('language');
    select.replaceChildren(...languages.map((name) => h('option', { value: name, lang: name }, languageName(name))));
    select.addEventListener('change', () => handlers.onLanguage(select.value));
  }

  /** What a new conversation begins with. */
  get system() {
    return typeof this.#kept.system === 'string' ? this.#kept.system : '';
  }

  get model() {
    return this.#kept.model ?? null;
  }

  get params() {
    return toParams(this.#kept, this.#limits);
  }

  /** Take what `opened` says. */
  set site({ limits, defaults }) {
    this.#limits = limits ?? {};
    this.#defaults = defaults ?? {};
    // Not while somebody types there.
    if (this.#dialog.open && !byId('sampling').contains(document.activeElement)) this.#paintFields();
  }

  open() {
    if (this.#dialog.open) return;
    byId('system').value = this.#handlers.current().system;
    byId('language').value = currentLanguage();
    this.#paintFields();
    this.#dialog.showModal();
    this.#handlers.onOpen();
  }

  /** Paint what has no text of its own in the template, in the language that is used now. */
  repaint() {
    this.#paintFields();
  }

  showModels(models) {
    const { model, isBusy } = this.#handlers.current();
    const focused = document.activeElement?.name === 'model';
    byId('models').replaceChildren(
      ...models.map((one) => {
        const radio = h('input', { type: 'radio', name: 'model', value: one.id, checked: one.id === model, disabled: isBusy && one.id !== model });
        radio.addEventListener('change', () => {
          this.#keep({ model: one.id });
          this.#handlers.onModel(one.id);
        });
        const state = h('span', { class: 'model-state', 'data-status': one.status }, stateText(one));
        return h('label', { class: 'model-choice' }, radio, h('span', {}, h('span', { class: 'model-id', dir: 'auto' }, modelText(one.id)), state));
      }),
    );
    if (focused) byId('models').querySelector('input:checked')?.focus();
  }

  #paintFields() {
    byId('sampling').replaceChildren(
      ...fields(this.#limits).map((field) => {
        const { name, min, max, step } = field;
        const standard = this.#defaults[name];
        const input = h('input', {
          type: 'number', id: `field-${name}`, min, max, step: step === 1 ? 1 : 'any', inputmode: 'decimal', 'aria-describedby': `hint-${name}`,
          placeholder: standard == null ? t('settings.default') : String(standard),
        });
        input.value = this.#kept[name] ?? '';
        input.addEventListener('change', () => {
          const value = readField(field, input.value);
          const isWrong = value === undefined || input.validity.badInput;
          input.setAttribute('aria-invalid', String(isWrong));
          if (!isWrong) this.#keep({ [name]: value });
        });
        const hint = h('span', { class: 'hint', id: `hint-${name}` }, `${t(`param.${name}_hint`)} ${t('settings.range', { min: wholeText(min), max: wholeText(max) })}`);
        return h('div', { class: 'field' }, h('label', { for: `field-${name}` }, t(`param.${name}`)), input, hint);
      }),
    );
  }

  #reset() {
    this.#kept = { model: this.#kept.model, system: this.#kept.system };
    this.#keep({});
    this.#paintFields();
  }

  #keep(change) {
    this.#kept = { ...this.#kept, ...change };
    try {
      localStorage.setItem(KEY, JSON.stringify(this.#kept));
    } catch {
      // storage may be forbidden; the settings then last as long as the page
    }
  }
}
