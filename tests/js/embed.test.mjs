import assert from 'node:assert/strict';
import { test } from 'node:test';
import { accentColours, contrast } from '../../static/js/embed/accent.js';
import { isFromParent, message, readLook, readMessage } from '../../static/js/embed/messages.js';
import { openFrame } from '../../static/js/frames.js';
import { snippet } from '../../static/js/generator/snippet.js';

const from = (values) => readMessage({ ns: 'umbel-chat', v: 1, ...values });

test('only the page around is heard, and only if the key names it', () => {
  const parent = {};
  const origins = ['https://shop.example'];
  assert.ok(isFromParent({ source: parent, origin: 'https://shop.example' }, parent, origins));
  for (const event of [
    { source: {}, origin: 'https://shop.example' },
    { source: null, origin: 'https://shop.example' },
    { source: parent, origin: 'https://evil.example' },
    { source: parent, origin: 'null' },
    { source: parent, origin: 'https://shop.example.evil.example' },
  ]) assert.equal(isFromParent(event, parent, origins), false);
});

test('messages have a namespace, a version and a known type', () => {
  assert.deepEqual(from({ type: 'open', text: 'x' }), { type: 'open' });
  assert.deepEqual(from({ type: 'send', text: ' hi ' }), { type: 'send', text: 'hi' });
  assert.deepEqual(from({ type: 'context', text: '' }), { type: 'context', text: '' });
  for (const values of [{ type: 'toString' }, { type: ['open'] }, {}, { v: 2, type: 'open' }, { ns: 'other', type: 'open' }]) assert.equal(from(values), null);
  for (const data of [null, undefined, 'open', 1, [], { type: 'open' }]) assert.equal(readMessage(data), null);
});

test('texts are texts, and bounded', () => {
  for (const text of [undefined, null, 1, {}, '', '  ']) {
    assert.equal(from({ type: 'send', text }), null);
    assert.equal(from({ type: 'prefill', text }), null);
  }
  assert.equal(from({ type: 'context', text: 5 }), null);
  assert.equal(from({ type: 'send', text: 'x'.repeat(20_000) }).text.length, 8000);
  assert.equal(from({ type: 'context', text: 'x'.repeat(20_000) }).text.length, 4000);
});

test('a look is made of known words, and never of styles', () => {
  const none = { theme: null, mode: null, lang: null, heading: null, accent: null };
  assert.deepEqual(readLook({}), none);
  assert.deepEqual(readLook({ theme: 'dark;', mode: 1, lang: '../en', heading: ' ', accent: 'red' }), none);
  assert.deepEqual(readLook({ accent: '#123456;background:url(//evil)', lang: 'e' }), none);
  const good = { theme: 'dark', mode: 'inline', lang: 'pt-BR', heading: 'Ask <us>', accent: '#abc' };
  assert.deepEqual(readLook(good), good);
  assert.equal(readLook({ heading: 'x'.repeat(500) }).heading.length, 80);
  assert.deepEqual(from({ type: 'set', ...good }), { type: 'set', look: good });
});

test('messages to the page say what they are', () => {
  assert.deepEqual(message('unread', { count: 2 }), { ns: 'umbel-chat', v: 1, type: 'unread', count: 2 });
});

test('any accent can be read on and beside', () => {
  assert.equal(Math.round(contrast('#ffffff', '#000000')), 21);
  for (const theme of ['light', 'dark']) {
    const surface = theme === 'light' ? '#ffffff' : '#1d2022';
    for (const accent of ['#ffe14d', '#2f7a55', '#000000', '#ffffff', '#777777', '#f0a']) {
      const colours = accentColours(accent, theme);
      assert.ok(contrast(colours['--accent'], colours['--on-accent']) >= 4.5, `${accent} ${theme}`);
      assert.ok(contrast(colours['--accent-strong'], surface) >= 4.5, `${accent} ${theme}`);
    }
  }
});

test('an embedded chat opens its session with its token', () => {
  assert.deepEqual(JSON.parse(openFrame(null, 'abc')), { type: 'open', protocol: 3, resume: true, embed: 'abc' });
});

const SITE = { origin: 'https://chat.example', version: '1.2.3', integrity: 'sha384-x' };

test('snippets have what was chosen and nothing else', () => {
  assert.equal(snippet({ form: 'script', key: 'wk_a' }, SITE), '<script async src="https://chat.example/widget/v1.js" data-key="wk_a"></script>');
  const chosen = { form: 'script', key: 'wk_a', title: 'A "b" <c>', position: 'bottom-left', theme: 'dark', lang: 'fr', accent: '#123456', width: '300', isPinned: true };
  assert.equal(
    snippet(chosen, SITE),
    '<script async src="https://chat.example/widget/v1.2.3.js" integrity="sha384-x" crossorigin="anonymous" data-key="wk_a" data-title="A &quot;b&quot; &lt;c>" data-position="bottom-left" data-theme="dark" data-lang="fr" data-accent="#123456" data-width="300"></script>',
  );
  assert.equal(
    snippet({ form: 'element', key: 'wk_a', position: 'bottom-left', height: '500' }, SITE),
    '<script async src="https://chat.example/widget/v1.js"></script>\n<umbel-chat key="wk_a" mode="inline" height="500"></umbel-chat>',
  );
  const frame = snippet({ form: 'iframe', key: 'a"b', theme: 'dark', lang: '' }, SITE);
  assert.match(frame, /src="https:\/\/chat\.example\/embed\/a%22b#theme=dark"/);
  assert.match(frame, / sandbox="allow-scripts allow-same-origin allow-forms /);
  assert.match(snippet({ form: 'script', key: '' }, SITE), /data-key="YOUR_KEY"/);
});
