/** The conversation on the page: what the person does and what the site says changes it, and every change is kept. */

import {
  ask, askAgain, canContinue, continueAnswer, edit, fail, interrupt, isGenerating, lastShown, receive, toSend,
} from './conversation.js';
import { byteLength, cancelFrame, generateFrame } from './frames.js';
import { t } from './i18n.js';
import { noticeText, stageText } from './texts.js';
import { find, path, switchVersion, version } from './tree.js';

const CONFIRM_MS = 3000; // the site confirms a stop within a step; a person need not wait for a step that hangs
const TAKEN_OVER = 4409; // the close code of a socket whose session another one took

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Return the answer that is or was written last, or null. */
export const answerOf = (conversation) => find(conversation, conversation.answerKey);

/** Event `change` when anything on the page may have to be painted. */
export class Chat extends EventTarget {
  #connection;
  #library;
  #say;
  #maxFrameBytes;
  #params;
  error = null; // what the alert shows: {code, message, retryable}

  /** `params()` are those of the next answer; `say` is told what a screen reader should read. */
  constructor({ connection, library, params, maxFrameBytes, say }) {
    super();
    this.#connection = connection;
    this.#library = library;
    this.#maxFrameBytes = maxFrameBytes;
    this.#say = say;
    this.#params = params;
    this.conversation = library.create();
    connection.addEventListener('event', ({ detail }) => this.#onEvent(detail));
    connection.awaited = () => (this.isGenerating ? { id: this.conversation.generationId, fromSeq: this.conversation.expectedSeq } : null);
    connection.addEventListener('reconnecting', () => this.#change(interrupt(this.conversation, true)));
    connection.addEventListener('lost', ({ detail }) => this.#onLost(detail));
  }

  get isGenerating() {
    return isGenerating(this.conversation);
  }

  send(text) {
    this.#start(ask(this.conversation, text, newId()));
  }

  edit(key, text) {
    this.#start(edit(this.conversation, key, text, newId()));
  }

  /** Ask for another version of an answer; without a key, of the last one. */
  again(key) {
    if (lastShown(this.conversation)) this.#start(askAgain(this.conversation, newId(), key));
  }

  /** Ask for more of the last answer. */
  continue() {
    const last = lastShown(this.conversation);
    if (last && canContinue(last)) this.#start(continueAnswer(this.conversation, newId()), true);
  }

  /** Show the version of a message that is `step` before or behind it. */
  switchVersion(key, step) {
    this.error = null;
    const { parent } = find(this.conversation, key);
    const next = switchVersion(this.conversation, key, step);
    const shown = version(next, path(next).find((message) => message.parent === parent));
    this.#say(t('version.shown', { index: shown.index + 1, count: shown.count }));
    this.#change(next);
  }

  stop() {
    if (!this.isGenerating) return;
    const id = this.conversation.generationId;
    const end = () => this.#change(receive(this.conversation, { type: 'done', id, finish_reason: 'cancelled' }));
    if (this.#connection.sendNow(cancelFrame(id))) setTimeout(end, CONFIRM_MS);
    else end();
  }

  /**
   * Show another conversation; an answer that is being written in this one is stopped. With `canResume`, one that was being
   * written in the other when the page was left is taken up again.
   */
  open(conversation, { canResume = false } = {}) {
    if (this.isGenerating) {
      const id = this.conversation.generationId;
      this.#connection.sendNow(cancelFrame(id));
      this.#change(receive(this.conversation, { type: 'done', id, finish_reason: 'cancelled' }));
    }
    this.error = null;
    this.conversation = conversation;
    if (this.isGenerating && !(canResume && this.#connection.resume())) this.conversation = fail(conversation);
    if (lastShown(this.conversation)?.state === 'failed') this.error = { code: 'interrupted', retryable: true };
    this.#tell();
  }

  /** Change what stands in the conversation besides messages: its name, its system prompt. */
  set(change) {
    this.conversation = { ...this.conversation, ...change };
    if (this.conversation.messages.length) this.#library.put(this.conversation, true);
    this.#tell();
  }

  #start(next, isContinued = false) {
    this.error = null;
    this.#say(t('status.generating'));
    this.#change({ ...next, updatedMs: Date.now() });
    const frame = generateFrame(next.generationId, toSend(next), this.#params(), isContinued);
    if (byteLength(frame) > this.#maxFrameBytes) return this.#failWith({ code: 'frame_too_large', retryable: false });
    this.#connection.send(frame);
    this.dispatchEvent(new Event('start'));
  }

  #onEvent(event) {
    if (event.type === 'resumed') return event.resumed ? this.#change(interrupt(this.conversation, false)) : this.#goOn();
    const isMine = event.id == null || event.id === this.conversation.generationId;
    if (event.type === 'error' && this.isGenerating && isMine) this.#failWith(event);
    else this.#change(receive(this.conversation, event));
  }

  /** The site has nothing more of the answer that was awaited: say so, and ask for the rest of it, or for it again. */
  #goOn() {
    if (!this.isGenerating) return;
    this.#change(fail(this.conversation));
    if (canContinue(answerOf(this.conversation))) this.continue();
    else this.again(this.conversation.answerKey);
    this.#say(t('status.not_resumed'));
  }

  #onLost({ code, wasWaiting }) {
    if (!this.isGenerating) return;
    this.#failWith({ code: code === TAKEN_OVER ? 'taken_over' : wasWaiting ? 'unreachable' : 'disconnected', retryable: true });
  }

  #failWith(problem) {
    const notice = answerOf(this.conversation)?.notice;
    this.error = { ...problem, blocks: notice?.kind === 'waiting' ? notice.blocks : [] };
    this.#say(''); // the alert speaks
    this.#change(fail(this.conversation));
  }

  #change(next) {
    const before = this.conversation;
    if (next === before) return this.#tell();
    this.#announceNotice(answerOf(before)?.notice, answerOf(next)?.notice);
    this.#announceStage(answerOf(before)?.stage, answerOf(next)?.stage);
    this.conversation = next;
    // A generation's begin and end are written at once, and what streams in from time to time.
    if (next.messages.length) this.#library.put(next, isGenerating(before) !== isGenerating(next));
    if (isGenerating(before) && !isGenerating(next)) this.#announceEnd();
    this.#tell();
  }

  /** Say what happens to the answer when that changes, and not every second that a wait takes. */
  #announceNotice(before, now) {
    if (now && (!before || noticeText(before) !== noticeText(now))) this.#say(noticeText(now));
  }

  /** Say each place in the queue, and that the chat is being read, but not how far. */
  #announceStage(before, now) {
    if (now && (now.kind !== before?.kind || now.kind === 'queued')) this.#say(stageText(now));
  }

  #announceEnd() {
    const answer = answerOf(this.conversation);
    if (this.error || !answer) return;
    this.#say(answer.state === 'stopped' ? t('status.stopped') : t('status.complete', { text: answer.content }));
  }

  #tell() {
    this.dispatchEvent(new Event('change'));
  }
}
