/** Pure: titles of conversations, and finding those in which all words of a query stand. */

const TITLE_LENGTH = 60;
const AROUND = 40;

/** Return text without case and accents, as it is searched. */
export function plain(text) {
  return text.normalize('NFKD').replace(/\p{Diacritic}/gu, '').toLowerCase();
}

/** Return the name that a person gave, else the beginning of the first question. */
export function titleOf({ name, messages }) {
  if (name) return name;
  const first = messages.find(({ role }) => role === 'user')?.content.trim().replace(/\s+/g, ' ') ?? '';
  const letters = [...first];
  return letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH).join('').trimEnd()}…` : first;
}

/**
 * Return [{record, excerpt}] of the records in which every word of `query` stands, in any branch; the excerpt is the
 * place of the first word where the title does not have it, else ''.
 */
export function search(records, query) {
  const words = plain(query).split(/\s+/).filter(Boolean);
  if (!words.length) return records.map((record) => ({ record, excerpt: '' }));
  return records.flatMap((record) => {
    const title = plain(titleOf(record));
    const texts = record.messages.map(({ content }) => content);
    const all = [title, ...texts.map(plain)].join('\n');
    if (!words.every((word) => all.includes(word))) return [];
    const missing = words.find((word) => !title.includes(word));
    return [{ record, excerpt: missing ? excerptOf(texts, missing) : '' }];
  });
}

function excerptOf(texts, word) {
  const text = texts.find((one) => plain(one).includes(word)) ?? '';
  const at = text.toLowerCase().indexOf(word);
  const start = Math.max(0, (at < 0 ? 0 : at) - AROUND);
  const part = text.slice(start, start + 2 * AROUND + word.length).replace(/\s+/g, ' ').trim();
  return `${start > 0 ? '…' : ''}${part}${start + part.length < text.length ? '…' : ''}`;
}
