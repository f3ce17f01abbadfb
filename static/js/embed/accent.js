/** Pure: one colour that a page chose becomes colours that can be read, as WCAG 2 counts contrast. */

const SURFACE = { light: '#ffffff', dark: '#1d2022' }; // as in chat.css
const INK = { light: '#23262b', dark: '#e8e7e3' };
const READABLE = 4.5;

function parts(colour) {
  const long = colour.length === 4 ? [...colour.slice(1)].map((digit) => digit + digit).join('') : colour.slice(1);
  return [0, 2, 4].map((at) => parseInt(long.slice(at, at + 2), 16) / 255);
}

function luminance(colour) {
  const [red, green, blue] = parts(colour).map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

/** Return the contrast of two colours, 1 to 21. */
export function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

/** Return the values of the style sheet's properties for an accent such as #2f7a55; `theme` is light or dark. */
export function accentColours(accent, theme) {
  const strong = contrast(accent, SURFACE[theme]) >= READABLE ? accent : INK[theme]; // what has to be read, such as links
  return {
    '--accent': accent,
    '--accent-strong': strong,
    '--on-accent': contrast(accent, '#ffffff') >= contrast(accent, '#000000') ? '#ffffff' : '#000000',
  };
}
