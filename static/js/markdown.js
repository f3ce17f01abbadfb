/**
 * Pure: an answer's markdown as blocks of markdown-it's tokens, parsed again only from the last block on.
 *
 * HTML in a text is text. What is written at the end of a text that still streams in is read as if it were closed, so that
 * a reader does not see markers that are about to vanish.
 */

import { MarkdownIt } from '../vendor/markdown-it.js';
import { isLoose, partsOf } from './block-parts.js';
import { withMath } from './markdown-math.js';

/**
 * A top-level block: `source` is its text, `isOpen` whether it is a fence that nothing has closed yet, `parts` what it grows by.
 * @typedef {{source: string, tokens: import('markdown-it').Token[], isOpen: boolean, start: number,
 *   parts: import('./block-parts.js').Part[]}} Block
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
    markOpenFence(tokens, source);
    blocks.push({ source: source.join('\n'), tokens, isOpen: Boolean(tokens[0].meta?.isOpen), start, parts: partsOf(tokens, source) });
    tokens = [];
  }
  return blocks;
}

/** Tell a fence at the end of a block, be it inside a list or a quote, whether something closes it, by `meta.isOpen`. */
function markOpenFence(tokens, lines) {
  const token = tokens.findLast(({ nesting }) => nesting !== -1);
  if (token?.type !== 'fence') return;
  const last = lines.at(-1).replace(/^[\s>]+/, '').trimEnd();
  const isAlone = token.map[1] - token.map[0] < 2;
  token.meta = { isOpen: isAlone || !last.startsWith(token.markup) || last.replaceAll(token.markup[0], '') !== '' };
}

/** Reads a text that grows at its end; blocks in front of the last one stay the same objects. */
export class MarkdownReader {
  #text = '';
  #isFinal = true;
  #blocks = [];
  #numDone = 0; // blocks that no text behind them can change
  #doneLength = 0; // of the text in front of the others
  #long = null; // the beginning of a long list or table, which is not parsed again

  /** How many characters the last call parsed; for tests. */
  numParsed = 0;

  /**
   * Return the blocks of `text`; it is cheap where the last call's text was its beginning.
   * @param {string} text
   * @param {boolean} isFinal whether nothing more will come
   * @returns {Block[]}
   */
  read(text, isFinal) {
    const clean = text.replaceAll('\r\n', '\n').replaceAll('\r', '\n');
    if (clean === this.#text && isFinal === this.#isFinal) return this.#blocks;
    if (isFinal || !clean.startsWith(this.#text)) this.#startOver();
    this.#text = clean;
    this.#isFinal = isFinal;
    if (isFinal) return (this.#blocks = this.#whole(clean));
    const tail = clean.slice(this.#doneLength);
    const found = this.#readOn(tail);
    this.#blocks = [...this.#blocks.slice(0, this.#numDone), ...found];
    if (found.length > 1) {
      this.#numDone += found.length - 1;
      this.#doneLength += offsetOfLine(tail, found.at(-1).start);
      this.#long = null;
    } else if (!this.#long || found[0]?.source.length - this.#long.offset > LONG_CHARS) {
      this.#long = beginningOf(found[0], tail);
    }
    return this.#blocks;
  }

  #startOver() {
    this.#numDone = this.#doneLength = 0;
    this.#long = null;
  }

  /** A whole text is parsed at once, as what comes late can change what stands early; blocks that it left alone stay. */
  #whole(text) {
    this.numParsed = text.length;
    const hasReferences = REFERENCE.test(text);
    return parseBlocks(text).map((block, index) => {
      const old = this.#blocks[index];
      return old?.source === block.source && !(hasReferences && block.source.includes('[')) ? old : block;
    });
  }

  #readOn(tail) {
    const long = this.#long;
    if (long) {
      const [first, ...others] = this.#parse(long.heading + tail.slice(long.offset));
      const block = joined(long, first);
      if (block) return [block, ...others.map((other) => ({ ...other, start: other.start + long.numLines }))];
    }
    this.#long = null;
    return this.#parse(tail);
  }

  #parse(text) {
    this.numParsed = text.length;
    return parseBlocks(mendEnd(text));
  }
}

const LONG_CHARS = 3000; // about a millisecond's work
const LONG = /^(?:bullet_list|ordered_list|table)_open$/;

/** Return what of a list or table need not be parsed again, or null: all but the last two items or rows. */
function beginningOf(block, text) {
  if (!block || block.start > 0 || block.source.length < LONG_CHARS || block.parts.length < 3 || !LONG.test(block.tokens[0].type)) return null;
  const { line } = block.parts.at(-2);
  const offset = offsetOfLine(text, line);
  const parts = block.parts.slice(0, -2);
  const isTable = block.tokens[0].type === 'table_open';
  const heading = isTable ? text.slice(0, offsetOfLine(text, 2)) : '';
  const tokens = block.tokens.slice(0, block.tokens.indexOf(parts.at(-1).tokens.at(-1)) + 1);
  return {
    parts, tokens, offset, heading, numLines: line - (isTable ? 2 : 0), source: text.slice(0, offset), isLoose: isLoose(parts),
  };
}

/** Return the block that a beginning and what was parsed behind it make, or null if they are not one block. */
function joined(long, block) {
  const [was, is] = [long.tokens[0], block?.tokens[0]];
  const isSame = block?.start === 0 && is.type === was.type && is.markup === was.markup && block.parts.length > 0;
  if (!isSame || isLoose(block.parts) !== long.isLoose) return null;
  const parts = block.parts.map((part) => ({ ...part, line: part.line + long.numLines }));
  const rest = block.tokens.slice(block.tokens.indexOf(block.parts[0].tokens[0]));
  const source = long.source + block.source.slice(long.heading.length);
  return { source, tokens: [...long.tokens, ...rest], isOpen: false, start: 0, parts: [...long.parts, ...parts] };
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
  if (/```|~~~/.test(text) && endsInCode(text)) return text;
  const last = lastPiece(text);
  const head = text.slice(0, text.length - last.length);
  let mended = last.replace(HALF_MARKER, '').replace(DANGLING, '').replace(OPEN_LINK, '$1');
  if (count(mended, /(?<!\\)`/g) % 2) return head + (mended.endsWith('`') ? mended.slice(0, -1) : `${mended}\``);
  const plain = mended.replaceAll(/`[^`]*`/g, '');
  for (const mark of ['~~', '**', '__']) {
    if (plain.split(mark).length % 2 === 0) mended = mended.trimEnd() + mark;
  }
  if (count(plain.replaceAll('**', ''), /(?<![\\*\s])\*(?!\*)|(?<!\\)\*(?=[^*\s])/g) % 2 && !/^\s*\*\s/m.test(plain)) mended += '*';
  return head + mended;
}

function endsInCode(text) {
  return parseBlocks(text).at(-1)?.tokens.some(({ meta }) => meta?.isOpen);
}

// A digit behind a list may become its next item, and a dash under a line its next item or a rule: until then, neither is read.
const HALF_MARKER = /(?:^|(?<=\n))[ \t]*(?:\d{1,9}[.)]?|[-*+=_]+)$/;
const BEGINS_PIECE = /^\s*(?:[-*+]\s|\d{1,9}[.)]\s|#{1,6}\s|>|\|)/;
const HEADING = /^\s*#{1,6}\s/;
const MAX_PIECE_CHARS = 4000;

/** Return the end of `text` that emphasis cannot reach into from before: from the last blank line, item, row or heading on. */
function lastPiece(text) {
  let start = text.length;
  while (start > 0) {
    const lineStart = start > 1 ? text.lastIndexOf('\n', start - 2) + 1 : 0;
    const line = text.slice(lineStart, start);
    if (line === '\n' || (start < text.length && HEADING.test(line))) break;
    start = lineStart;
    if (BEGINS_PIECE.test(line) || text.length - start > MAX_PIECE_CHARS) break;
  }
  return text.slice(start);
}

function count(text, pattern) {
  return text.match(pattern)?.length ?? 0;
}
