/** Light or dark: as the system says, until the person chooses; the choice stays in this browser. */

import { t } from './i18n.js';

const KEY = 'umbel-theme';

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage may be forbidden; the choice then lasts as long as the page
  }
}

function store(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // see above
  }
}

/** Apply an earlier choice: before anything is waited for, so that the page does not change before the reader's eyes. */
export function applyKeptTheme() {
  const found = stored();
  if (found === 'dark' || found === 'light') document.documentElement.dataset.theme = found;
}

/** Make `button` change the colours, and apply an earlier choice; return what names the button anew. */
export function setUpTheme(button) {
  const system = matchMedia('(prefers-color-scheme: dark)');
  const current = () => document.documentElement.dataset.theme ?? (system.matches ? 'dark' : 'light');
  const label = () => button.setAttribute('aria-label', t(current() === 'dark' ? 'theme.to_light' : 'theme.to_dark'));
  applyKeptTheme();
  label();
  system.addEventListener('change', label);
  button.addEventListener('click', () => {
    const next = current() === 'dark' ? 'light' : 'dark';
    document.documentElement.dataset.theme = next;
    store(next);
    label();
  });
  return { label };
}
