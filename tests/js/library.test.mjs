import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ask, edit, emptyConversation, receive } from '../../static/js/conversation.js';
import { search, titleOf } from '../../static/js/search.js';
import { fileName, fromJson, toJson, toMarkdown } from '../../static/js/transfer.js';
import { path } from '../../static/js/tree.js';

const META = { id: '0123-4567-89ab', name: '', createdMs: 1, updatedMs: 2, system: 'Be\nbrief.', isTemporary: false };
const told = (question, answer) => {
  const events = [{ type: 'delta', id: 'g', seq: 0, text: answer, tokens: 1 }, { type: 'done', id: 'g', seq: 1, finish_reason: 'stop', usage: { prompt_tokens: 5, completion_tokens: 3 }, timings: { ttft_s: 0.2, tokens_per_s: 4 } }];
  return events.reduce(receive, ask({ ...emptyConversation(), ...META }, question, 'g'));
};
const one = told('What is an umbel?', 'A flower head.');

test('a conversation is called by its name, else by its first question', () => {
  assert.equal(titleOf(one), 'What is an umbel?');
  assert.equal(titleOf({ ...one, name: 'Dill' }), 'Dill');
  assert.equal(titleOf(told(`a\n b ${'🌼'.repeat(80)}`, '')), `a b ${'🌼'.repeat(56)}…`);
  assert.equal(titleOf(emptyConversation()), '');
});

test('all words have to stand somewhere, whatever their case and accents', () => {
  const records = [one, told('Über Dill', 'Ça sent bon.'), { ...told('x', 'y'), name: 'Résumé' }];
  const found = (query) => search(records, query).map(({ record }) => records.indexOf(record));
  assert.deepEqual(['', 'UMBEL flower', 'uber', 'ca sent', 'resume', 'umbel dill', '  '].map(found), [[0, 1, 2], [0], [1], [1], [2], [], [0, 1, 2]]);
  assert.equal(search(records, 'flower')[0].excerpt, 'A flower head.');
  assert.equal(search(records, 'umbel')[0].excerpt, '');
  assert.match(search([told('q', `${'a '.repeat(60)}word${' b'.repeat(60)}`)], 'word')[0].excerpt, /^….{30,}word.{30,}…$/);
});

test('other versions are searched as well', () => {
  assert.equal(search([edit(one, 1, 'Other?', 'h')], 'flower').length, 1);
});

test('what is exported comes back, all versions of it', () => {
  const two = receive(edit(one, 1, 'Other?', 'h'), { type: 'done', id: 'h', finish_reason: 'cancelled' });
  const [back] = fromJson(toJson([two]));
  assert.deepEqual(path(back).map(({ content }) => content), ['Other?', '']);
  assert.equal(back.messages.length, 4);
  assert.deepEqual([back.id, back.system, back.createdMs, back.updatedMs, back.nextKey], [META.id, META.system, 1, 2, 5]);
  assert.equal(back.messages[1].outcome.timings.tokens_per_s, 4);
  assert.equal(toJson(fromJson(toJson([one]))), toJson([one]));
});

test('an answer that is being written is exported as a stopped one', () => {
  const [back] = fromJson(toJson([ask(one, 'more', 'h')]));
  assert.equal(back.messages.at(-1).state, 'stopped');
  assert.equal(back.generationId, null);
});

test('files that are none are refused, and circles with them', () => {
  const file = (change) => {
    const whole = JSON.parse(toJson([one]));
    change(whole);
    return JSON.stringify(whole);
  };
  for (const text of [
    '', '[]', 'null', '{}', file((whole) => (whole.version = 2)), file((whole) => (whole.conversations = [null])),
    file(({ conversations: [found] }) => (found.id = '../x')),
    file(({ conversations: [found] }) => (found.messages[0].parent = 2)),
    file(({ conversations: [found] }) => (found.messages[1].key = 1)),
    file(({ conversations: [found] }) => (found.messages[0].role = 'system')),
    file(({ conversations: [found] }) => (found.messages[0].content = {})),
    file(({ conversations: [found] }) => (found.messages[0].state = 'streaming')),
  ]) assert.throws(() => fromJson(text), text);
});

test('what is odd in a file but harmless is mended', () => {
  const whole = JSON.parse(toJson([one]));
  Object.assign(whole.conversations[0], { name: 5, updatedMs: 'x', chosen: { 1: 99, x: 1 }, extra: 1 });
  whole.conversations[0].messages[1].outcome = { finish_reason: 'stop', usage: 'x' };
  const [back] = fromJson(JSON.stringify(whole));
  assert.deepEqual([back.name, back.updatedMs, back.chosen, back.messages[1].outcome, back.extra], ['', 0, {}, null, undefined]);
});

test('Markdown holds what is shown', () => {
  assert.equal(toMarkdown(one, { user: 'You', assistant: 'Umbel' }), '# What is an umbel?\n\n> Be\n> brief.\n\n## You\n\nWhat is an umbel?\n\n## Umbel\n\nA flower head.\n');
});

test('names of files are harmless', () => {
  assert.equal(fileName('../What is <it>?', 'md'), 'What-is-it.md');
  assert.equal(fileName('مرحبا', 'md'), 'مرحبا.md');
  assert.equal(fileName('///', 'json'), 'umbel.json');
});
