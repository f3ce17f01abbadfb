/** Pure: the page's keyboard shortcuts, those that Open WebUI and llama.cpp share. */

/** What can be pressed, in the order of the list; `mod` is Ctrl, or Cmd on a Mac. */
export const SHORTCUTS = [
  { name: 'new', keys: ['mod', 'Shift', 'O'] },
  { name: 'search', keys: ['mod', 'K'] },
  { name: 'sidebar', keys: ['mod', 'Shift', 'S'] },
  { name: 'stop', keys: ['Esc'] },
  { name: 'compose', keys: ['Shift', 'Esc'] },
  { name: 'copy', keys: ['mod', 'Shift', 'C'] },
  { name: 'copy_code', keys: ['mod', 'Shift', ';'] },
  { name: 'edit', keys: ['↑'] },
  { name: 'list', keys: ['mod', '/'] },
];

const BY_KEY = { o: 'new', s: 'sidebar', c: 'copy', ';': 'copy_code', ':': 'copy_code' };

/** Return the name of the shortcut that a keydown event is, or null. `edit` is one only in an empty message field. */
export function shortcutOf({ key, code, shiftKey, ctrlKey, metaKey, altKey, isComposing, keyCode }) {
  if (isComposing || keyCode === 229 || altKey) return null;
  const isMod = ctrlKey || metaKey;
  if (key === 'Escape' && !isMod) return shiftKey ? 'compose' : 'stop';
  if (key === 'ArrowUp' && !isMod && !shiftKey) return 'edit';
  if (!isMod) return null;
  if (key === '/') return 'list'; // on some keyboards with Shift
  if (shiftKey) return BY_KEY[key.toLowerCase()] ?? (code === 'Semicolon' ? 'copy_code' : null);
  return key.toLowerCase() === 'k' ? 'search' : null;
}

/** Return the keys of a shortcut as they are called on this machine. */
export function keyNames({ keys }, isMac) {
  return keys.map((key) => (key === 'mod' ? (isMac ? '⌘' : 'Ctrl') : key));
}
