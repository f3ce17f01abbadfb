/**
 * Pure: an answer's markdown as blocks of markdown-it's tokens, parsed again only from the last block on.
 *
 * HTML in a text is text. What is written at the end of a text that still streams in is read as if it were closed, so that
 * a reader does not see markers that are about to vanish.
 */

import { MarkdownIt } from '../vendor/markdown-it.js';
import { withMath } from './markdown-math.js';

/**
 * A top-level block: `source` is its text, `isOpen` whether it is a fence that nothing has closed yet.
 * @typedef {{source: string, tokens: import('markdown-it').Token[], isOpen: boolean}} Block
 */

const parser = withMath(new MarkdownIt({ html: false, linkify: true, breaks: true, typographer: false }));

const REFERENCE = /^ {0,3}\[[^\]\n]+\]:/m;
const SAFE = /^(?:https?:\/\/|mailto:)/i;

/** Return `href` if a link may lead there, else null. */
export function safeHref(href) {
  return href && SAFE.test(href) ? href : null;
}

/**
 * Return the blocks of a whole text.
 * @param {string} text
 * @returns {Block[]}
 */
export function parseBlocks(text) {
  const lines = text.split('\n');
  const blocks = [];
  let tokens = [];
  for (const token of parser.parse(text, {})) {
    tokens.push(token);
    if (token.level > 0 || token.nesting === 1) continue;
    const [start, end] = tokens[0].map ?? [0, 0];
    const source = lines.slice(start, end);
    blocks.push({ source: source.join('\n'), tokens, isOpen: isOpenFence(tokens[0], source), start });
    tokens = [];
  }
  return blocks;
}

function isOpenFence(token, lines) {
  if (token.type !== 'fence') return false;
  const last = lines.at(-1).trim();
  return lines.length < 2 || !last.startsWith(token.markup) || last.replaceAll(token.markup[0], '') !== '';
}

/** Reads a text that grows at its end; blocks in front of the last one stay the same objects. */
export class MarkdownReader {
  #text = '';
  #isFinal = true;
  #blocks = [];
  #numDone = 0; // blocks that no text behind them can change
  #doneLength = 0; // of the text in front of the others

  /**
   * Return the blocks of `text`; it is cheap where the last call's text was its beginning.
   * @param {string} text
   * @param {boolean} isFinal whether nothing more will come
   * @returns {Block[]}
   */
  read(text, isFinal) {
    const clean = text.replaceAll('\r\n', '\n').replaceAll('\r', '\n');
    if (clean === this.#text && isFinal === this.#isFinal) return this.#blocks;
    const isGrown = clean.startsWith(this.#text) && !(isFinal && REFERENCE.test(clean));
    if (!isGrown) this.#blocks = [];
    if (!isGrown) this.#numDone = this.#doneLength = 0;
    this.#text = clean;
    this.#isFinal = isFinal;
    const tail = clean.slice(this.#doneLength);
    const found = parseBlocks(isFinal ? tail : mendEnd(tail));
    this.#blocks = [...this.#blocks.slice(0, this.#numDone), ...found];
    if (found.length > 1) {
      this.#numDone += found.length - 1;
      this.#doneLength += offsetOfLine(tail, found.at(-1).start);
    }
    return this.#blocks;
  }
}

function offsetOfLine(text, number) {
  let offset = 0;
  for (let line = 0; line < number; line += 1) offset = text.indexOf('\n', offset) + 1;
  return offset;
}

const OPEN_LINK = /!?\[([^\][\n]*)\]\([^)\n]*$/;
const DANGLING = /(?:^|(?<=\s))(?:\*{1,3}|_{1,3}|~{1,2}|`+|!?\[)$/;

/**
 * Return `text` with what its last paragraph leaves open closed: emphasis, code, a link's address.
 * @param {string} text
 */
export function mendEnd(text) {
  const start = Math.max(text.lastIndexOf('\n\n') + 2, 0);
  const last = text.slice(start < 2 ? 0 : start);
  if (/^ {0,3}(?:```|~~~)/m.test(text)) {
    const blocks = parseBlocks(text);
    if (blocks.at(-1)?.isOpen) return text;
  }
  const head = text.slice(0, text.length - last.length);
  let mended = last.replace(DANGLING, '').replace(OPEN_LINK, '$1');
  if (count(mended, /(?<!\\)`/g) % 2) return head + (mended.endsWith('`') ? mended.slice(0, -1) : `${mended}\``);
  const plain = mended.replaceAll(/`[^`]*`/g, '');
  for (const mark of ['~~', '**', '__']) {
    if (plain.split(mark).length % 2 === 0) mended = mended.trimEnd() + mark;
  }
  if (count(plain.replaceAll('**', ''), /(?<![\\*\s])\*(?!\*)|(?<!\\)\*(?=[^*\s])/g) % 2 && !/^\s*\*\s/m.test(plain)) mended += '*';
  return head + mended;
}

function count(text, pattern) {
  return text.match(pattern)?.length ?? 0;
}
