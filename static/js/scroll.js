/** Following the end of the conversation, for as long as the reader is there. */

const NEAR_PX = 48;

export class Follower {
  #scroller;
  #button;
  #isFollowing = true;

  constructor(scroller, button) {
    this.#scroller = scroller;
    this.#button = button;
    scroller.addEventListener('scroll', () => this.#look(), { passive: true });
    button.addEventListener('click', () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(scroller);
  }

  /** Go to the end and stay there. */
  toEnd() {
    this.#isFollowing = true;
    this.follow();
  }

  /** Call after the content grew. A message that is being edited stays where it is. */
  follow() {
    if (this.#isFollowing && !this.#scroller.querySelector('.edit-form')) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#show();
  }

  #distance() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  #look() {
    this.#isFollowing = this.#distance() < NEAR_PX;
    this.#show();
  }

  #show() {
    this.#button.hidden = this.#distance() < NEAR_PX;
  }
}
