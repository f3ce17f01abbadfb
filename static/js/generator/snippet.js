/** Pure: the lines that put the chat on a page. */

const SANDBOX = 'allow-scripts allow-same-origin allow-forms allow-popups allow-popups-to-escape-sandbox';

const escape = (text) => String(text).replaceAll('&', '&amp;').replaceAll('"', '&quot;').replaceAll('<', '&lt;');

function tag(name, attributes, inside = '') {
  const written = Object.entries(attributes)
    .filter(([, value]) => value !== '' && value !== null && value !== undefined)
    .map(([key, value]) => (value === true ? ` ${key}` : ` ${key}="${escape(value)}"`));
  return `<${name}${written.join('')}>${inside}</${name}>`;
}

/** Return the attributes of the element <umbel-chat> for what was chosen, without the empty ones. */
export function elementAttributes({ form, key, title, position, theme, lang, accent, width, height }) {
  const isInline = form === 'element';
  const found = isInline
    ? { key, mode: 'inline', heading: title, theme, lang, accent, height }
    : { key, heading: title, position: position === 'bottom-right' ? '' : position, theme, lang, accent, width, height };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value));
}

/** Return the address of the page for a frame without a script. */
export function frameAddress({ key, theme, lang }, { origin }) {
  const look = new URLSearchParams(Object.entries({ theme, lang }).filter(([, value]) => value)).toString();
  return `${origin}/embed/${encodeURIComponent(key)}${look ? `#${look}` : ''}`;
}

function scriptAttributes(isPinned, { origin, version, integrity }) {
  return {
    async: true,
    src: `${origin}/widget/v${isPinned ? version : '1'}.js`,
    ...(isPinned ? { integrity, crossorigin: 'anonymous' } : {}),
  };
}

/** Return the lines for what was chosen; `site` is {origin, version, integrity}. */
export function snippet(choices, site) {
  const { form, height, isPinned } = choices;
  const key = choices.key || 'YOUR_KEY';
  if (form === 'iframe') {
    const src = frameAddress({ ...choices, key }, site);
    return tag('iframe', { src, title: 'Chat', loading: 'lazy', allow: 'clipboard-write', sandbox: SANDBOX, width: '100%', height: height || 600 });
  }
  const attributes = elementAttributes({ ...choices, key });
  const script = scriptAttributes(isPinned, site);
  if (form === 'element') {
    return `${tag('script', script)}\n${tag('umbel-chat', attributes)}`;
  }
  const { heading, ...others } = attributes;
  const data = Object.entries({ key, title: heading, ...others }).map(([name, value]) => [`data-${name}`, value]);
  return tag('script', { ...script, ...Object.fromEntries(data) });
}
