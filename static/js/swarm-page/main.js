/** The status page: sorts its tables, copies commands, and takes the page anew while somebody looks; it stands without this. */

import { byId, h } from '../dom.js';
import { t, useCatalogue } from '../i18n.js';
import { copyButton } from '../message-actions.js';
import { setUpTheme } from '../theme.js';
import { sortTable, watchTables } from './sorting.js';

const POLL_MS = 20_000;
const SOON_MS = 400; // behind an event, in case several come at once

const config = JSON.parse(byId('config').textContent);
useCatalogue(config.language, config.texts);
setUpTheme(byId('theme'));
byId('theme').hidden = false;

let timer = 0;
let hasEvents = false;

function equip(root) {
  for (const box of root.querySelectorAll('.command')) {
    if (!box.querySelector('button')) box.append(copyButton(t('swarm.copy'), () => box.querySelector('code').textContent, sayCopied));
  }
  watchTables(root);
}

function sayCopied(isCopied) {
  byId('status').textContent = t(isCopied ? 'status.copied' : 'status.copy_refused');
}

/** Return the page as it is now, as a document whose scripts never run. */
function fetchPage() {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.responseType = 'document';
    request.open('GET', location.href);
    request.onload = () => (request.status === 200 && request.response ? resolve(request.response) : reject(new Error(`status ${request.status}`)));
    request.onerror = () => reject(new Error('unreachable'));
    request.send();
  });
}

function takeOver(fresh) {
  byId('as-of').textContent = fresh.getElementById('as-of').textContent;
  const overall = byId('overall');
  const newest = fresh.getElementById('overall');
  overall.dataset.state = newest.dataset.state;
  if (overall.textContent !== newest.textContent) overall.textContent = newest.textContent; // read out when it changes only
  for (const card of fresh.querySelectorAll('.card')) {
    const old = document.getElementById(card.id);
    if (!old) byId('cards').append(document.adoptNode(card));
    else if (!old.contains(document.activeElement)) replace(old, document.adoptNode(card)); // nobody's place is lost
  }
  equip(byId('cards'));
}

function replace(old, card) {
  const isOpen = old.querySelector('.join')?.open;
  if (isOpen !== undefined && card.querySelector('.join')) card.querySelector('.join').open = isOpen;
  const table = old.querySelector('.nodes');
  const sorted = table && { column: table.dataset.column, order: table.dataset.order };
  old.replaceWith(card);
  if (sorted?.column) sortTable(card.querySelector('.nodes'), Number(sorted.column), sorted.order);
}

async function refresh() {
  clearTimeout(timer);
  if (document.visibilityState !== 'visible') return;
  try {
    takeOver(await fetchPage());
  } catch {
    // What is shown says of when it is.
  }
  schedule(POLL_MS);
}

function schedule(delay_ms) {
  clearTimeout(timer);
  timer = setTimeout(refresh, delay_ms);
}

function listen() {
  const events = new EventSource('/api/v2/swarm/events');
  events.addEventListener('swarm', () => {
    if (hasEvents) schedule(SOON_MS);
    hasEvents = true; // the first one tells what the page shows already
  });
  addEventListener('pagehide', () => events.close());
}

addEventListener('visibilitychange', () => document.visibilityState === 'visible' && schedule(SOON_MS));
equip(document);
listen();
schedule(POLL_MS);
