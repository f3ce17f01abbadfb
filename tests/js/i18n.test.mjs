import assert from 'node:assert/strict';
import { afterEach, test } from 'node:test';
import { chooseLanguage, dateText, directionOf, languageName, shortNumber, t, useCatalogue } from '../../static/js/i18n.js';
import { english } from './english.mjs';

afterEach(() => useCatalogue('en', english));

test('values are put in, numbers as the language writes them', () => {
  useCatalogue('en', { a: '{n} of {text}, {unknown}' });
  assert.equal(t('a', { n: 12345, text: '12345' }), '12,345 of 12345, {unknown}');
  useCatalogue('es', { a: '{n}' });
  assert.equal(t('a', { n: 12345 }), '12.345');
  assert.equal(shortNumber(12.34), '12,3');
});

test('a number chooses the plural form of the language', () => {
  const forms = { zero: 'Z', one: 'O', two: 'T', few: 'F', many: 'M', other: 'R {count}' };
  useCatalogue('ar', { a: forms });
  assert.deepEqual([0, 1, 2, 3, 11].map((count) => t('a', { count })), ['Z', 'O', 'T', 'F', 'M']);
  useCatalogue('en', { a: { one: 'O', other: 'R {count}' } });
  assert.deepEqual([0, 1, 5].map((count) => t('a', { count })), ['R 0', 'O', 'R 5']);
});

test('what a language lacks is English, and what nobody has is its key', () => {
  useCatalogue('fr', { a: 'un' }, { a: 'one', b: 'two' });
  assert.deepEqual(['a', 'b', 'c'].map((key) => t(key)), ['un', 'two', 'c']);
});

test('text that looks like a placeholder is not filled in again', () => {
  useCatalogue('en', { a: '{x} {y}' });
  assert.equal(t('a', { x: '{y}', y: 'z' }), '{y} z');
});

test('the first known language that the browser wants is taken', () => {
  const known = ['ar', 'en', 'zh'];
  assert.equal(chooseLanguage(['de-DE', 'zh-Hans-CN', 'en'], known), 'zh');
  assert.equal(chooseLanguage(['AR'], known), 'ar');
  assert.equal(chooseLanguage(['de'], known), 'en');
  assert.equal(chooseLanguage([], known), 'en');
  assert.deepEqual(['ar', 'ar-EG', 'en', 'zh'].map(directionOf), ['rtl', 'rtl', 'ltr', 'ltr']);
  assert.equal(languageName('fr'), 'français');
});

test('days are told by their date and today by its time', () => {
  const noon = new Date(2026, 4, 5, 12, 30).getTime();
  assert.match(dateText(noon, noon + 60_000), /12:30/);
  assert.match(dateText(noon, noon + 48 * 3_600_000), /May 5, 2026/);
});
