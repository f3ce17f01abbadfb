/** The token by which the site knows which key a session belongs to: it is short-lived, and fetched anew when it is old. */

const FRESH_SHARE = 0.8; // of its life; the rest is for clocks and slow lines

const FETCH_MS = 10_000; // then the old one has to do

export class Pass {
  #address;
  #token;
  #lifeMs;
  #staleMs;

  constructor(address, token, lifeS) {
    this.#address = address;
    this.#lifeMs = lifeS * 1000 * FRESH_SHARE;
    this.#token = token;
    this.#staleMs = Date.now() + this.#lifeMs;
  }

  /** The site refused it: the next one is to be another. */
  drop() {
    this.#staleMs = 0;
  }

  /** Return the token to open a session with. */
  async get() {
    if (Date.now() < this.#staleMs) return this.#token;
    try {
      const answer = await fetch(this.#address, { cache: 'no-store', signal: AbortSignal.timeout(FETCH_MS) });
      if (answer.ok) this.#token = (await answer.json()).token;
      this.#staleMs = Date.now() + this.#lifeMs;
    } catch {
      // The socket tells of a site that cannot be reached, or that does not take the old one.
    }
    return this.#token;
  }
}
