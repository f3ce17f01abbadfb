/** Pure: which way a text is written. */

const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/gu;
const LTR = /[A-Za-z\u00c0-\u024f\u0370-\u052f\u0900-\u1fff\u3040-\u9fff\uac00-\ud7af]/gu;
const ENOUGH = 2000;

/**
 * Return the direction of most letters of `text` outside code; `auto` where there is none.
 * @param {string} text
 * @returns {'rtl' | 'ltr' | 'auto'}
 */
export function directionOf(text) {
  const words = text.slice(0, ENOUGH).replaceAll(/```[\s\S]*?(?:```|$)|`[^`]*`|https?:\/\/\S+/g, '');
  const rtl = words.match(RTL)?.length ?? 0;
  const ltr = words.match(LTR)?.length ?? 0;
  return rtl || ltr ? (rtl > ltr ? 'rtl' : 'ltr') : 'auto';
}
