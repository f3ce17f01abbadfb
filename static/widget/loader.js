/** Umbel's chat on any page: the element <umbel-chat> and the functions of UmbelChat. Asks for nothing before it is opened. */
(() => {
  const NS = 'umbel-chat';
  const script = document.currentScript; // there is none for a module
  if (!script || customElements.get(NS)) return;
  const { origin: ORIGIN } = new URL(script.src);
  const READY_MS = 8000; // for the frame to say that it is there, from its begin and from its load on
  const MAX_CHARS = 8000;
  const LOOKS = ['theme', 'lang', 'accent', 'heading'];

  // Open the chat, close it, unread, it cannot be shown here, where else.
  const TEXTS = {
    en: 'Open the chat|Close the chat|unread|The chat cannot be shown on this page.|Open it in a new tab',
    ar: 'فتح الدردشة|إغلاق الدردشة|غير مقروءة|لا يمكن عرض الدردشة في هذه الصفحة.|فتحها في علامة تبويب جديدة',
    es: 'Abrir el chat|Cerrar el chat|sin leer|El chat no puede mostrarse en esta página.|Abrirlo en otra pestaña',
    fr: 'Ouvrir le chat|Fermer le chat|non lus|Le chat ne peut pas s’afficher sur cette page.|L’ouvrir dans un nouvel onglet',
    hi: 'चैट खोलें|चैट बंद करें|अपठित|इस पेज पर चैट नहीं दिखाई जा सकती।|नए टैब में खोलें',
    id: 'Buka obrolan|Tutup obrolan|belum dibaca|Obrolan tidak dapat ditampilkan di halaman ini.|Buka di tab baru',
    pt: 'Abrir o chat|Fechar o chat|não lidas|O chat não pode ser mostrado nesta página.|Abrir em uma nova aba',
    sw: 'Fungua mazungumzo|Funga mazungumzo|hayajasomwa|Mazungumzo hayawezi kuonyeshwa kwenye ukurasa huu.|Fungua katika kichupo kipya',
    vi: 'Mở trò chuyện|Đóng trò chuyện|chưa đọc|Không thể hiển thị trò chuyện trên trang này.|Mở trong thẻ mới',
    zh: '打开聊天|关闭聊天|未读|此页面无法显示聊天。|在新标签页中打开',
  };

  const sheet = new CSSStyleSheet(); // no style attribute, no <style>: the page's policy may forbid both
  sheet.replaceSync(`
    :host{all:initial;display:block;font:15px/1.4 system-ui,sans-serif;color-scheme:light;--line:#dedacf;--page:#fbfaf7;--ink:#23262b;--fill:var(--umbel-accent,#2f7a55)}
    :host([data-dark]){color-scheme:dark;--line:#363b3f;--page:#16181a;--ink:#e8e7e3}
    :host([mode=inline]){height:var(--height,var(--auto,26rem));max-height:var(--umbel-max-height,min(45rem,90vh));min-height:16rem}
    [hidden]{display:none!important}
    .launcher,.panel{position:fixed;z-index:var(--umbel-z-index,2147483000);inset:auto 1rem 1rem auto}
    :host([position$=left]) :is(.launcher,.panel){inset:auto auto 1rem 1rem}
    .launcher{width:56px;height:56px;padding:0;border:0;border-radius:50%;background:var(--fill);color:#fff;cursor:pointer;box-shadow:0 2px 12px #0005}
    :is(.launcher,a):focus-visible{outline:3px solid var(--ink);outline-offset:2px;box-shadow:0 0 0 2px var(--page)}
    @supports (color:oklch(from red l c h)){.launcher{color:oklch(from var(--fill) clamp(0,(.66 - l)*999,1) 0 0)}}
    svg{width:28px;height:28px;display:block;margin:auto;fill:none;stroke:currentColor;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
    .badge{position:absolute;inset:-4px -4px auto auto;min-width:20px;padding:0 5px;box-sizing:border-box;border-radius:10px;background:#a3282d;color:#fff;font:600 12px/20px system-ui,sans-serif;text-align:center}
    .panel{box-sizing:border-box;bottom:calc(1rem + 68px)!important;width:min(var(--width,400px),100vw - 2rem);height:min(var(--height,600px),100dvh - 2rem - 68px);border:1px solid var(--line);border-radius:16px;overflow:hidden;background:var(--page);box-shadow:0 8px 40px #0004;animation:come .16s ease-out}
    @keyframes come{from{opacity:0;translate:0 12px}}
    :host([mode=inline]) .panel{position:static;width:100%;height:100%;box-shadow:none;animation:none}
    .panel.full{inset:var(--top,0) 0 auto!important;width:100%;height:var(--seen,100dvh);border:0;border-radius:0}
    iframe{display:block;width:100%;height:100%;border:0}
    .refused{height:100%;display:grid;place-content:center;justify-items:center;gap:12px;padding:24px;box-sizing:border-box;text-align:center;color:var(--ink);background:var(--page)}
    p,a{margin:0;color:inherit;unicode-bidi:plaintext}
    @media (prefers-reduced-motion:reduce){.panel{animation:none}}
    @media print{:host{display:none}}`);

  const make = (name, properties, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  const icon = (path) => {
    const create = (name) => document.createElementNS('http://www.w3.org/2000/svg', name);
    const [svg, line] = [create('svg'), create('path')];
    svg.setAttribute('viewBox', '0 0 24 24');
    svg.ariaHidden = 'true';
    line.setAttribute('d', path);
    svg.append(line);
    return svg;
  };
  const CHAT = 'M5 5h14v10H11l-5 4v-4H5z';
  const CROSS = 'M6 6l12 12M18 6L6 18';

  const phone = matchMedia('(max-width: 639.98px)');
  const dark = matchMedia('(prefers-color-scheme: dark)');

  class ChatElement extends HTMLElement {
    static observedAttributes = [...LOOKS, 'mode', 'width', 'height', 'launcher'];
    #root = this.attachShadow({ mode: 'open' });
    #launcher = make('button', { className: 'launcher', type: 'button', ariaHasPopup: 'dialog', onclick: () => this.toggle() });
    #panel = make('div', { className: 'panel', id: 'panel', hidden: true });
    #frame = null;
    #isReady = false;
    #waiting = []; // for the frame to be there
    #timers = [];
    #unread = 0;
    #focused = null; // what had the focus before the chat
    #inert = []; // what stands behind a chat that fills the screen
    #signal = null; // ends all listeners

    constructor() {
      super();
      this.#root.adoptedStyleSheets = [sheet];
      this.#launcher.setAttribute('aria-controls', 'panel');
      this.#root.append(this.#panel, this.#launcher);
      this.#root.addEventListener('keydown', (event) => event.key === 'Escape' && this.close());
    }

    connectedCallback() {
      const end = new AbortController();
      this.#signal = end;
      const listen = (target, type, listener) => target.addEventListener(type, listener, { signal: end.signal });
      listen(window, 'message', (event) => this.#hear(event));
      listen(document, 'securitypolicyviolation', ({ blockedURI, disposition }) => disposition === 'enforce' && blockedURI.startsWith(ORIGIN) && this.#refuse());
      for (const query of [phone, dark]) listen(query, 'change', () => this.#paint());
      for (const type of ['resize', 'scroll']) listen(visualViewport, type, () => this.#fit());
      this.#paint();
      if (this.#isInline) this.open();
    }

    disconnectedCallback() {
      this.#signal.abort();
      this.#leave();
      this.#panel.hidden = true;
      this.#fit();
    }

    attributeChangedCallback(name, before, now) {
      if (before === now || !this.isConnected) return;
      this.#paint();
      if (LOOKS.includes(name)) this.#post('set', this.#look());
    }

    get isOpen() {
      return !this.#panel.hidden;
    }

    get #isInline() {
      return this.getAttribute('mode') === 'inline';
    }

    get #address() {
      return `${ORIGIN}/embed/${encodeURIComponent(this.getAttribute('key') ?? '')}`;
    }

    open() {
      if (this.isOpen || !this.isConnected) return;
      const { activeElement, body } = document;
      this.#focused = activeElement === body || activeElement === this ? this.#launcher : activeElement;
      this.#panel.hidden = false;
      if (!this.#isReady) this.#load();
      this.#paint();
      if (!this.#isInline) this.#focusFrame();
      this.#tell('open');
    }

    close() {
      if (!this.isOpen || this.#isInline) return;
      const hadFocus = document.activeElement === this;
      this.#panel.hidden = true;
      this.#post('close');
      this.#paint();
      if (hadFocus) this.#focused.focus();
      this.#tell('close');
    }

    toggle() {
      if (this.isOpen) this.close();
      else this.open();
    }

    /** Ask in the person's place. */
    send(text) {
      this.open();
      this.context(text, 'send');
    }

    /** Put a text into the message field. */
    prefill(text) {
      this.open();
      this.context(text, 'prefill');
    }

    /** Tell the model about the page; shows nothing. */
    context(text, type = 'context') {
      const command = [type, { text: String(text).slice(0, MAX_CHARS) }];
      if (this.#isReady) this.#post(...command);
      else this.#waiting.push(command);
    }

    destroy() {
      this.remove();
    }

    #load() {
      this.#leave();
      const frame = make('iframe', { title: this.#heading, loading: 'lazy', allow: 'clipboard-write' });
      frame.sandbox = 'allow-scripts allow-same-origin allow-forms allow-popups allow-popups-to-escape-sandbox';
      frame.onload = () => {
        this.#post('hello');
        this.#wait();
      };
      frame.src = `${this.#address}#${new URLSearchParams(this.#look())}`;
      this.#frame = frame;
      this.#panel.replaceChildren(frame);
      if (!this.#isInline) this.#wait(); // another one is loaded when it comes into view
    }

    #wait() {
      this.#timers.push(setTimeout(() => this.#refuse(), READY_MS));
    }

    #leave() {
      this.#timers.forEach(clearTimeout);
      this.#timers = [];
      this.#frame = null;
      this.#isReady = false;
      this.#panel.replaceChildren();
    }

    /** Say that the chat cannot be here; the frame stays, it may only be slow. */
    #refuse() {
      if (this.#isReady || !this.#frame || this.#panel.querySelector('.refused')) return;
      const [, , , text, link] = this.#texts;
      const anchor = make('a', { href: this.#address, target: '_blank', rel: 'noopener' }, link);
      const hadFocus = document.activeElement === this;
      this.#frame.hidden = true;
      this.#panel.append(make('div', { className: 'refused', role: 'alert', lang: this.#lang }, make('p', {}, text), anchor));
      if (hadFocus) anchor.focus();
      this.#tell('refused');
    }

    #post(type, values) {
      if (this.#isReady || type === 'hello') this.#frame.contentWindow.postMessage({ ns: NS, v: 1, type, ...values }, ORIGIN);
    }

    #hear({ source, origin, data }) {
      if (!this.#frame || source !== this.#frame.contentWindow || origin !== ORIGIN || data?.ns !== NS || data.v !== 1) return;
      if (data.type === 'ready') this.#greet();
      else if (!this.#isReady) return;
      else if (data.type === 'close') this.close();
      else if (data.type === 'resize' && data.height > 0) this.style.setProperty('--auto', `${Math.ceil(data.height)}px`);
      else if (data.type === 'unread' && data.count >= 0) {
        this.#unread = Math.min(99, Math.floor(data.count));
        this.#paint();
        this.#tell('unread', { count: this.#unread });
      } else if (data.type === 'event' && /^[a-z]{1,20}$/.test(data.name)) this.#tell(data.name);
    }

    #greet() {
      const isNew = !this.#isReady;
      this.#isReady = true;
      this.#panel.querySelector('.refused')?.remove();
      this.#frame.hidden = false;
      this.#paint();
      this.#post('set', this.#look());
      if (this.isOpen && !this.#isInline) this.#focusFrame();
      for (const [type, values] of this.#waiting.splice(0)) this.#post(type, values);
      if (isNew) this.#tell('ready');
    }

    #focusFrame() {
      this.#frame.focus();
      this.#post('open');
    }

    #tell(name, detail = {}) {
      this.dispatchEvent(new CustomEvent(`${NS}:${name}`, { detail, bubbles: true, composed: true }));
    }

    get #heading() {
      return this.getAttribute('heading') || 'Chat';
    }

    get #lang() {
      const wanted = this.getAttribute('lang');
      const name = wanted && wanted !== 'auto' ? wanted : document.documentElement.lang || navigator.language;
      return name || 'en';
    }

    get #texts() {
      return (TEXTS[this.#lang.slice(0, 2).toLowerCase()] ?? TEXTS.en).split('|');
    }

    #look() {
      const [theme, accent, heading] = ['theme', 'accent', 'heading'].map((name) => this.getAttribute(name) ?? '');
      return { theme, heading, mode: this.#isInline ? 'inline' : 'bubble', lang: this.#lang, accent: accent || getComputedStyle(this).getPropertyValue('--umbel-accent').trim() };
    }

    #paint() {
      const [open, close, unread] = this.#texts;
      const theme = this.getAttribute('theme');
      this.toggleAttribute('data-dark', theme === 'dark' || (theme !== 'light' && dark.matches));
      const accent = this.getAttribute('accent');
      if (CSS.supports('color', accent)) this.#launcher.style.setProperty('--fill', accent);
      for (const name of ['width', 'height']) {
        const value = parseInt(this.getAttribute(name), 10);
        if (value > 0) this.style.setProperty(`--${name}`, `${value}px`);
      }
      const isOpen = this.isOpen;
      const count = isOpen ? 0 : this.#unread;
      const label = isOpen ? close : open;
      this.#launcher.hidden = this.#isInline || (isOpen && phone.matches && this.#isReady) || this.getAttribute('launcher') === 'none';
      this.#launcher.replaceChildren(icon(isOpen ? CROSS : CHAT), ...(count ? [make('span', { className: 'badge', ariaHidden: 'true' }, String(count))] : []));
      this.#launcher.ariaLabel = count ? `${label} (${count} ${unread})` : label;
      this.#launcher.ariaExpanded = String(isOpen);
      this.#launcher.lang = this.#lang;
      if (!this.#isInline) Object.assign(this.#panel, { role: 'dialog', ariaLabel: this.#heading });
      if (this.#frame) this.#frame.title = this.#heading;
      this.#fit();
    }

    /** Fill a phone's screen, or what its keyboard leaves of it, and keep the focus out of what is behind. */
    #fit() {
      const isFull = this.isOpen && !this.#isInline && phone.matches;
      const { height, offsetTop } = visualViewport;
      this.#panel.classList.toggle('full', isFull);
      this.#panel.style.setProperty('--seen', `${height}px`);
      this.#panel.style.setProperty('--top', `${offsetTop}px`);
      this.#panel.ariaModal = isFull ? 'true' : null;
      if (isFull === this.#inert.length > 0) return;
      for (const element of this.#inert.splice(0)) element.inert = false;
      for (let at = this; isFull && at.parentElement; at = at.parentElement) {
        for (const other of at.parentElement.children) if (other !== at && !other.inert) this.#inert.push(other);
      }
      for (const element of this.#inert) element.inert = true;
    }
  }

  customElements.define(NS, ChatElement);

  const api = { version: '1.0.0' };
  const NAMES = ['open', 'close', 'toggle', 'send', 'prefill', 'context', 'destroy'];
  for (const name of NAMES) api[name] = (...values) => document.querySelector(NS)?.[name](...values);
  api.on = (name, listener) => {
    const hear = ({ detail }) => listener(detail);
    document.addEventListener(`${NS}:${name}`, hear);
    return () => document.removeEventListener(`${NS}:${name}`, hear);
  };
  api.push = (...commands) => {
    for (const [name, ...values] of commands) if (name === 'on' || NAMES.includes(name)) api[name](...values);
  };

  const start = () => {
    const { key, title, ...others } = script.dataset;
    if (key) {
      const element = document.createElement(NS);
      const found = { key, ...(title ? { heading: title } : {}), ...others };
      for (const [name, value] of Object.entries(found)) element.setAttribute(name, value);
      if (found.mode === 'inline' && document.body.contains(script)) script.after(element);
      else document.body.append(element);
    }
    const queue = window.UmbelChat;
    window.UmbelChat = api;
    if (Array.isArray(queue)) api.push(...queue);
  };
  if (document.body && document.readyState !== 'loading') start();
  else document.addEventListener('DOMContentLoaded', start);
})();
