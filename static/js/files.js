/** Conversations as files that a person saves and opens. */

import { byId, h } from './dom.js';
import { t } from './i18n.js';
import { titleOf } from './search.js';
import { fileName, fromJson, toJson, toMarkdown } from './transfer.js';

const MOST_BYTES = 50_000_000; // of a file that is read; the whole of it has to fit into memory

function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Make the buttons of the sidebar work; `current()` is the conversation that is shown, `say` tells what was done. */
export function setUpFiles({ library, current, say, onImported }) {
  const names = () => ({ user: t('role.user'), assistant: t('role.assistant') });
  byId('export-json').addEventListener('click', () => save('umbel-chats.json', toJson(library.all()), 'application/json'));
  byId('export-markdown').addEventListener('click', () => {
    const record = current();
    save(fileName(titleOf(record), 'md'), toMarkdown(record, names()), 'text/markdown');
  });
  const field = byId('import-file');
  byId('import').addEventListener('click', () => field.click());
  field.addEventListener('change', async () => {
    const [file] = field.files;
    field.value = '';
    if (!file) return;
    const records = await read(file);
    if (!records) return say(t('import.failed'));
    for (const record of records) library.put(record, true);
    say(t('import.done', { count: records.length }));
    onImported(records);
  });
}

async function read(file) {
  if (file.size > MOST_BYTES) return null;
  try {
    return fromJson(await file.text());
  } catch {
    return null; // none of ours, or broken
  }
}
