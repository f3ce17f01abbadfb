"""A site whose model computes nothing: each token is the time at which it was made. For bench/web.py."""

import argparse
import time
from dataclasses import replace

from app.config import SiteConfig, SocketLimits
from app.server import serve
from tests.app.fake_site import make_app
from tests.app.fake_swarm import FakeModel, FakeSession

PLACES_BESIDE = 20  # more sockets than are measured, so that nobody is refused


class StampingModel(FakeModel):
    """Says what time it is, every `delay_s`; the clock is the machine's monotonic one."""

    def open_session(self, max_length: int) -> "StampingSession":
        with self.lock:
            self.counts.opened += 1
        return StampingSession(self, max_length)

    def token_id(self, piece: str) -> int:
        return 0 if piece.startswith(" ") else super().token_id(piece)  # stamps are all different


class StampingSession(FakeSession):
    """One session of a StampingModel."""

    def _step_is_cancelled(self) -> bool:
        is_cancelled = super()._step_is_cancelled()
        self._script = [f" {time.monotonic():.6f}"]
        return is_cancelled


def main() -> None:
    """Serve until the end of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sockets", type=int, required=True)
    parser.add_argument("--delay", type=float, required=True)
    options = parser.parse_args()
    sockets = replace(SocketLimits(), ws_max=options.sockets + PLACES_BESIDE)
    config = SiteConfig(port=0, http_threads=16, sockets=sockets)
    model = StampingModel(delay_s=options.delay, max_length=1_000_000)
    serve(config, lambda site_config: make_app(site_config, model))


if __name__ == "__main__":
    main()
