/** An answer's markdown as elements. Blocks that did not change keep theirs, so that a selection in them survives. */

import { directionOf } from './bidi.js';
import { numSame } from './block-parts.js';
import { h, icon } from './dom.js';
import { MarkdownReader, safeHref } from './markdown.js';
import { showCode } from './code-colours.js';
import { showMath } from './formulas.js';

const HEADINGS = { h1: 'h3', h2: 'h4', h3: 'h5', h4: 'h6', h5: 'h6', h6: 'h6' };
const TAGS = new Set([
  'p', 'ul', 'ol', 'li', 'blockquote', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'strong', 'em', 's',
]);
const PICTURE = 'M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4';
const LINK = { rel: 'noopener noreferrer nofollow ugc', target: '_blank' };

/** The body of a message; `update` brings it to a new text. */
export class AnswerView {
  #reader = new MarkdownReader();
  #shown = []; // {block, isFinal, element} of every child
  #codeBlock;

  /**
   * @param {HTMLElement} element to fill
   * @param {(language: string, code: Element) => HTMLElement} codeBlock makes the frame around a block of code
   */
  constructor(element, codeBlock) {
    this.element = element;
    this.#codeBlock = codeBlock;
  }

  /** How many blocks the last update made anew or changed; for tests. */
  numTouched = 0;

  /** How many items, rows or words of blocks that grew were made anew; for tests. */
  numPartsTouched = 0;

  /** Show `text`; `isFinal` when nothing more comes. */
  update(text, isFinal) {
    const blocks = this.#reader.read(text, isFinal);
    const direction = directionOf(text);
    // Setting it, even to what it is, makes the browser work out the style of the whole answer again.
    if (this.element.dir !== direction) this.element.dir = direction;
    this.numTouched = this.numPartsTouched = 0;
    blocks.forEach((block, index) => this.#show(index, block, isFinal));
    for (const { element } of this.#shown.splice(blocks.length)) element.remove();
  }

  #show(index, block, isFinal) {
    const old = this.#shown[index];
    if (old?.block === block && (old.isFinal || !block.isOpen || !isFinal)) return;
    this.numTouched += 1;
    const isDone = isFinal || !block.isOpen;
    if (old && old.block.isOpen && block.tokens[0].type === 'fence' && continuesCode(old, block)) {
      if (isDone) showCode(old.element.querySelector('code'), languageOf(block.tokens[0]), block.tokens[0].content);
      this.#shown[index] = { block, isFinal, element: old.element };
      return;
    }
    const element = old && growsByParts(old.block, block) ? this.#grow(old, block) : this.#element(block, isDone);
    if (!old) this.element.append(element);
    else if (old.element !== element) old.element.replaceWith(element);
    this.#shown[index] = { block, isFinal, element };
  }

  #element(block, isDone) {
    const [first] = block.tokens;
    switch (first.type) {
      case 'fence':
      case 'code_block': {
        const code = h('code', {}, first.content.replace(/\n$/, ''));
        if (isDone) showCode(code, languageOf(first), first.content);
        return this.#codeBlock(languageOf(first), code);
      }
      default: {
        const holder = h('div');
        this.#fill(holder, block.tokens);
        return holder.childNodes.length === 1 ? holder.firstElementChild ?? holder : holder;
      }
    }
  }

  /** Keep the parts that stayed as they are: all of a long list or paragraph would be made anew at every token. */
  #grow({ element, block: { parts: before } }, { parts: now }) {
    const holder = element.querySelector(':scope > table > tbody') ?? element;
    let same = numSame(before, now);
    const node = holder.childNodes[same];
    const text = now[same]?.tokens[0];
    if (node instanceof Text && text?.type === 'text' && text.content.startsWith(node.data)) {
      node.appendData(text.content.slice(node.data.length));
      same += 1;
    }
    while (holder.childNodes.length > same) holder.lastChild.remove();
    for (const { tokens } of now.slice(same)) this.#fill(holder, tokens);
    this.numPartsTouched += now.length - same;
    return element;
  }

  #fill(parent, tokens) {
    const stack = [parent];
    for (const token of tokens) {
      const top = stack.at(-1);
      if (token.nesting === 1) stack.push(this.#open(token, top));
      else if (token.nesting === -1) stack.pop();
      else this.#leaf(token, top);
    }
  }

  #open(token, top) {
    if (token.hidden) return top; // a paragraph of a tight list
    if (token.type === 'link_open') return append(top, linkElement(token.attrGet('href')));
    const tag = HEADINGS[token.tag] ?? (TAGS.has(token.tag) ? token.tag : 'span');
    const properties = {};
    if (tag === 'ol') properties.start = token.attrGet('start');
    if (tag === 'th') properties.scope = 'col';
    const align = /text-align:(left|center|right)/.exec(token.attrGet('style') ?? '')?.[1];
    if (align) properties.class = `align-${align}`;
    const element = h(tag, properties);
    if (tag !== 'table') return append(top, element);
    append(top, h('div', { class: 'table', tabindex: '0' }, element));
    return element;
  }

  #leaf(token, top) {
    switch (token.type) {
      case 'inline':
        return this.#fill(top, taskOf(token, top));
      case 'softbreak':
      case 'hardbreak':
        return append(top, h('br'));
      case 'hr':
        return append(top, h('hr'));
      case 'code_inline':
        return append(top, h('code', { dir: 'ltr' }, token.content));
      case 'fence':
      case 'code_block': {
        const code = h('code', {}, token.content.replace(/\n$/, ''));
        if (!token.meta?.isOpen) showCode(code, languageOf(token), token.content);
        return append(top, this.#codeBlock(languageOf(token), code));
      }
      case 'math_inline':
        return append(top, showMath(token.content, token.markup === '$$' || token.markup === '\\['));
      case 'math_block':
        return append(top, showMath(token.content, true));
      case 'image': {
        const link = append(top, linkElement(token.attrGet('src')));
        link.append(icon(PICTURE), token.content || token.attrGet('src') || '');
        return link;
      }
      default:
        return top.append(token.content);
    }
  }
}

function append(parent, element) {
  parent.append(element);
  return element;
}

function linkElement(address) {
  const href = safeHref(address);
  return href ? h('a', { href, ...LINK }) : h('span');
}

/** Put the box of `- [x] done` in front of its item; return the tokens of the rest. */
function taskOf(token, top) {
  const item = top.closest?.('li');
  const found = /^\[([ xX])\]\s/.exec(token.content);
  if (!item || !found || item.textContent || token.children[0]?.type !== 'text') return token.children;
  item.classList.add('task');
  top.append(h('input', { type: 'checkbox', disabled: true, checked: found[1] !== ' ', 'aria-label': found[1] === ' ' ? '☐' : '☑' }));
  const [first, ...rest] = token.children;
  const left = Object.assign(Object.create(Object.getPrototypeOf(first)), first, { content: first.content.slice(3) });
  return [left, ...rest];
}

function languageOf(token) {
  const word = (token.info ?? '').trim().split(/\s+/)[0] ?? '';
  return /^[\w+#.-]{1,20}$/.test(word) ? word : '';
}

/** Whether a block is the earlier one with other parts at its end. */
function growsByParts(before, block) {
  const [was, is] = [before.tokens[0], block.tokens[0]];
  if (!before.parts.length || !block.parts.length || was.type !== is.type) return false;
  if (is.type === 'table_open') return headingOf(before) === headingOf(block);
  return was.attrGet('start') === is.attrGet('start');
}

function headingOf({ source }) {
  return source.split('\n', 2).join('\n');
}

/** Let a block of code that grows keep its text node; return whether it could. */
function continuesCode(old, block) {
  const [before, now] = [old.block.tokens[0], block.tokens[0]];
  const node = old.element.querySelector('code')?.firstChild ?? null;
  const text = now.content.replace(/\n$/, '');
  if (before.type !== 'fence' || before.info !== now.info || !node || !text.startsWith(node.data)) return false;
  node.appendData(text.slice(node.data.length));
  return true;
}
