/**
 * Pure: the parts that a long block grows by: items of a list, rows of a table, words and marks of a paragraph.
 *
 * Parts in front of the last ones never change while a text grows, so their elements can stay.
 * @typedef {{text: string, tokens: import('markdown-it').Token[], line?: number}} Part
 */

/**
 * Return the parts of a block, each with its tokens and a text that differs where the part does; none for other blocks.
 * @param {import('markdown-it').Token[]} tokens of one top-level block
 * @param {string[]} lines of its source
 * @returns {Part[]}
 */
export function partsOf(tokens, lines) {
  switch (tokens[0].type) {
    case 'bullet_list_open':
    case 'ordered_list_open':
      return outerParts(tokens, lines, 'list_item_open', 1);
    case 'table_open':
      return outerParts(tokens.slice(tokens.findIndex(({ type }) => type === 'tbody_open')), lines, 'tr_open', 2, tokens[0]);
    case 'paragraph_open':
      return inlineParts(tokens[1].children);
    default:
      return [];
  }
}

function outerParts(tokens, lines, type, level, outer = tokens[0]) {
  const parts = [];
  let part = null;
  for (const token of tokens) {
    if (token.type === type && token.level === level) {
      const [start, end] = token.map.map((line) => line - outer.map[0]);
      part = { text: lines.slice(start, end).join('\n').trimEnd(), tokens: [], line: start };
      parts.push(part);
    }
    if (!part) continue;
    if (token.level < level) break;
    part.tokens.push(token);
    if (isLooseMark(token)) part.text += '\0';
  }
  return parts;
}

function isLooseMark(token) {
  return token.type === 'paragraph_open' && token.level === 2 && !token.hidden;
}

/** Whether space was left between items, which makes each of them a paragraph. */
export function isLoose(parts) {
  return parts.some(({ tokens }) => tokens.some(isLooseMark));
}

/** Every part becomes one node: a text, a break, a link with all that is in it. */
function inlineParts(tokens) {
  const parts = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) parts.push({ text: '', tokens: [] });
    const part = parts.at(-1);
    part.tokens.push(token);
    part.text += `${token.type}\0${token.markup}\0${token.attrs?.join('\0') ?? ''}\0${token.content}\0`;
    depth += token.nesting;
  }
  return parts;
}

/**
 * Return how many parts at the beginning are the same.
 * @param {Part[]} before
 * @param {Part[]} now
 */
export function numSame(before, now) {
  let same = 0;
  while (same < before.length && same < now.length && (before[same] === now[same] || before[same].text === now[same].text)) same += 1;
  return same;
}
