/** A reader's report of an answer to those who run the site. The conversation goes along only if the reader says so. */

import { showNote, question } from './dialogs.js';
import { h } from './dom.js';
import { t } from './i18n.js';

const PATH = '/api/v2/reports';
const REASONS = ['harmful', 'false', 'private', 'other'];
const MAX_COMMENT = 2000; // what the site takes

/**
 * Ask what is wrong, and send it. `messages` are what was said up to the answer, as {role, content}; `model` is its name.
 * Resolves to true once the site has it, to false where the reader left or the site took nothing.
 */
export async function reportAnswer({ messages, model, say }) {
  const wanted = await askForReport();
  if (!wanted) return false;
  const { isTold, ...report } = wanted;
  const isSent = await send({ ...report, model: model ?? '', ...(isTold ? { conversation: messages } : {}) });
  if (isSent) say(t('report.sent'));
  else await showNote({ title: t('report.title'), text: t('report.failed') });
  return isSent;
}

async function askForReport() {
  const form = h('div', { class: 'report' });
  const radios = REASONS.map((reason, index) => h('input', { type: 'radio', name: 'reason', value: reason, required: true, autofocus: index === 0 }));
  const choices = radios.map((radio) => h('label', { class: 'choice' }, radio, t(`report.${radio.value}`)));
  const comment = h('textarea', { rows: 3, maxlength: MAX_COMMENT, dir: 'auto', id: 'report-comment' });
  const consent = h('input', { type: 'checkbox', 'aria-describedby': 'report-hint' });
  form.append(
    h('p', {}, t('report.who')),
    h('fieldset', {}, h('legend', {}, t('report.reason')), ...choices),
    h('div', { class: 'field' }, h('label', { for: 'report-comment' }, t('report.comment')), comment),
    h('label', { class: 'choice' }, consent, t('report.conversation')),
    h('p', { class: 'hint', id: 'report-hint' }, t('report.conversation_hint')),
  );
  if (!(await question({ title: t('report.title'), content: form, action: t('report.send') }))) return null;
  const reason = radios.find((radio) => radio.checked)?.value;
  return reason ? { reason, comment: comment.value.trim(), isTold: consent.checked } : null;
}

async function send(report) {
  try {
    const response = await fetch(PATH, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(report) });
    return response.ok;
  } catch {
    return false;
  }
}
