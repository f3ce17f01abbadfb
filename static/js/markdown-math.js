/** Pure: formulas for markdown-it, as tokens `math_inline` and `math_block` with the TeX in `content`. */

const BLOCKS = [['$$', '$$'], ['\\[', '\\]']];
const INLINE = [['$$', '$$'], ['\\[', '\\]'], ['\\(', '\\)']];

/** Return `parser` with rules for `$…$`, `$$…$$`, `\(…\)` and `\[…\]`. */
export function withMath(parser) {
  parser.inline.ruler.before('escape', 'math', inlineRule);
  parser.block.ruler.before('fence', 'math', blockRule, { alt: ['paragraph', 'reference', 'blockquote', 'list'] });
  return parser;
}

function inlineRule(state, silent) {
  const found = delimited(state.src, state.pos, state.posMax) ?? dollars(state.src, state.pos, state.posMax);
  if (!found) return false;
  if (!silent) {
    const token = state.push('math_inline', 'math', 0);
    token.content = found.tex;
    token.markup = found.mark;
  }
  state.pos = found.end;
  return true;
}

function delimited(src, pos, max) {
  for (const [open, close] of INLINE) {
    if (!src.startsWith(open, pos)) continue;
    const end = src.indexOf(close, pos + open.length);
    if (end < 0 || end + close.length > max) return null;
    const tex = src.slice(pos + open.length, end).trim();
    return tex ? { tex, mark: open, end: end + close.length } : null;
  }
  return null;
}

/** One dollar is a price more often than a formula: no space inside the marks, no digit behind, no mere number and words. */
function dollars(src, pos, max) {
  if (src[pos] !== '$' || src[pos + 1] === '$' || /\s/.test(src[pos + 1] ?? ' ')) return null;
  for (let end = pos + 1; end < max && src[end] !== '\n'; end += 1) {
    if (src[end] === '\\') end += 1;
    else if (src[end] === '$') {
      const tex = src.slice(pos + 1, end);
      const isPrice = /\s$/.test(tex) || /\d/.test(src[end + 1] ?? '') || (/^\d/.test(tex) && !/[\\^_={}]/.test(tex));
      return isPrice ? null : { tex, mark: '$', end: end + 1 };
    }
  }
  return null;
}

function blockRule(state, startLine, endLine, silent) {
  const lineAt = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = lineAt(startLine);
  const marks = BLOCKS.find(([open]) => first.startsWith(open));
  if (!marks) return false;
  const [open, close] = marks;
  let line = startLine;
  let rest = first.slice(open.length);
  const tex = [];
  while (!rest.includes(close)) {
    tex.push(rest);
    line += 1;
    if (line >= endLine || state.sCount[line] < state.blkIndent) return false;
    rest = lineAt(line);
  }
  const end = rest.indexOf(close);
  if (rest.slice(end + close.length).trim()) return false;
  if (silent) return true;
  tex.push(rest.slice(0, end));
  state.line = line + 1;
  const token = state.push('math_block', 'math', 0);
  token.content = tex.join('\n').trim();
  token.markup = open;
  token.map = [startLine, state.line];
  return true;
}
