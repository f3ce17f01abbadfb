/** Pure: the page's texts in the person's language. */

const RIGHT_TO_LEFT = new Set(['ar', 'fa', 'he', 'ur']);

let language = 'en';
let english = {};
let catalogue = {};
let plural = new Intl.PluralRules('en');
let whole = new Intl.NumberFormat('en');
let tenth = new Intl.NumberFormat('en', { minimumFractionDigits: 1, maximumFractionDigits: 1 });

/**
 * Take a catalogue as the one of `name`; `fallback` is the English one, which has every key. A catalogue is flat: {name} stands for
 * what is put in, and an object of plural forms (`one`, `few`, `other`, …) where a number decides.
 */
export function useCatalogue(name, texts, fallback = texts) {
  language = name;
  catalogue = texts;
  english = fallback;
  plural = new Intl.PluralRules(name);
  whole = new Intl.NumberFormat(name);
  tenth = new Intl.NumberFormat(name, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
}

/** Return the text of `key`; numbers among `values` are written as the language writes them, `count` chooses the form. */
export function t(key, values = {}) {
  const found = catalogue[key] ?? english[key];
  if (found === undefined) return key;
  const form = typeof found === 'string' ? found : (found[plural.select(values.count ?? 0)] ?? found.other);
  return form.replace(/\{(\w+)\}/g, (mark, name) => {
    const value = values[name];
    return value === undefined ? mark : typeof value === 'number' ? whole.format(value) : String(value);
  });
}

/** Return a number as the language writes it. */
export const wholeText = (value) => whole.format(value);

/** Return a number with about three digits: 0.4, 12.3, 145. */
export const shortNumber = (value) => (value >= 100 ? whole.format(Math.round(value)) : tenth.format(value));

/** Return when something was: the time for today, else the day. */
export function dateText(time_ms, now_ms) {
  const isToday = new Date(time_ms).toDateString() === new Date(now_ms).toDateString();
  const parts = isToday ? { hour: 'numeric', minute: '2-digit' } : { year: 'numeric', month: 'short', day: 'numeric' };
  return new Intl.DateTimeFormat(language, parts).format(time_ms);
}

export const currentLanguage = () => language;
export const directionOf = (name) => (RIGHT_TO_LEFT.has(name.split('-')[0]) ? 'rtl' : 'ltr');

/** Return a language's own name, such as “Deutsch”. */
export function languageName(name) {
  return new Intl.DisplayNames([name], { type: 'language', fallback: 'code' }).of(name) ?? name;
}

/** Return the first of `wanted` (such as navigator.languages) that is among `known`, else English. */
export function chooseLanguage(wanted, known) {
  for (const name of wanted) {
    const parts = name.split('-');
    const found = known.find((one) => one.toLowerCase() === name.toLowerCase()) ?? known.find((one) => one === parts[0].toLowerCase());
    if (found) return found;
  }
  return 'en';
}
