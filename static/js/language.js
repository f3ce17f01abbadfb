/** The language of the page: the person's choice, else the browser's; its catalogue is fetched when it is needed. */

import { chooseLanguage, currentLanguage, directionOf, t, useCatalogue } from './i18n.js';

const KEY = 'umbel-language';

async function load(name) {
  const answer = await fetch(new URL(`../locales/${name}.json`, import.meta.url));
  if (!answer.ok) throw new Error(`no catalogue for ${name}`);
  return answer.json();
}

/**
 * Show the page in `name`, and keep that choice if `isChoice`; without a name, in the language chosen before, else the
 * browser's.
 */
export async function setLanguage(known, name = null, { isChoice = true } = {}) {
  const wanted = name ?? kept();
  const chosen = chooseLanguage(wanted ? [wanted, ...navigator.languages] : navigator.languages, known);
  if (name && isChoice) keep(chosen);
  const fallback = load('en');
  const texts = chosen === 'en' ? fallback : load(chosen).catch(() => null);
  const [own, all] = await Promise.all([texts, fallback]);
  useCatalogue(own ? chosen : 'en', own ?? all, all);
  document.documentElement.lang = currentLanguage();
  document.documentElement.dir = directionOf(currentLanguage());
  translatePage();
  for (const link of document.querySelectorAll('a.swarm-link')) link.href = `/swarm?lang=${currentLanguage()}`;
}

/** Fill in the texts of elements that name them: data-t for the content, data-t-NAME for the attribute. */
export function translatePage(root = document) {
  for (const element of root.querySelectorAll('[data-t]')) element.textContent = t(element.dataset.t);
  for (const name of ['aria-label', 'title', 'placeholder']) {
    for (const element of root.querySelectorAll(`[data-t-${name}]`)) element.setAttribute(name, t(element.getAttribute(`data-t-${name}`)));
  }
}

function kept() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage may be forbidden; the choice then lasts as long as the page
  }
}

function keep(name) {
  try {
    localStorage.setItem(KEY, name);
  } catch {
    // see above
  }
}
