/** Pure: a message's text as a list of blocks: paragraphs, and fenced code as it stands. */

/**
 * @typedef {{kind: 'paragraph', text: string} | {kind: 'code', language: string, text: string, isOpen: boolean}} Block
 */

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;

/** Whether `line` closes a fence that was opened with `mark`. */
function closes(line, mark) {
  const found = /^ {0,3}(`{3,}|~{3,})[ \t]*$/.exec(line);
  return found !== null && found[1][0] === mark[0] && found[1].length >= mark.length;
}

/**
 * Return the blocks of `text`. A fence that is still open while the text streams in is a code block already.
 * Blocks in front of the last one stay as they are when text is added, so a renderer may keep them.
 * @param {string} text
 * @returns {Block[]}
 */
export function toBlocks(text) {
  /** @type {Block[]} */
  const blocks = [];
  /** @type {string[]} */
  let lines = [];
  /** @type {{mark: string, language: string} | null} */
  let fence = null;
  const endParagraph = () => {
    if (lines.length) blocks.push({ kind: 'paragraph', text: lines.join('\n') });
    lines = [];
  };
  for (const line of text.replaceAll('\r\n', '\n').split('\n')) {
    if (fence) {
      if (closes(line, fence.mark)) {
        blocks.push({ kind: 'code', language: fence.language, text: lines.join('\n'), isOpen: false });
        fence = null;
        lines = [];
      } else lines.push(line);
      continue;
    }
    const opened = FENCE.exec(line);
    if (opened) {
      endParagraph();
      fence = { mark: opened[1], language: languageOf(opened[2]) };
    } else if (line.trim() === '') endParagraph();
    else lines.push(line);
  }
  if (fence) blocks.push({ kind: 'code', language: fence.language, text: lines.join('\n'), isOpen: true });
  else endParagraph();
  return blocks;
}

function languageOf(info) {
  const word = info.trim().split(/\s+/)[0] ?? '';
  return /^[\w+#.-]{1,20}$/.test(word) ? word : '';
}
