"""Pure: how much of the device each peer may take from the others.

Decode steps are shared equally among sessions: many of them are load, not abuse. Everything else runs in pieces (see
`scheduler.py`), and each piece may keep somebody's decode step waiting. So every peer has an account in seconds:

    - It starts with a burst and refills with `share` seconds a second. While it is above zero, the peer's pieces run at
      full speed, and cost the time that they took. So a new user's prompt, or one now and then, is not held up.
    - At zero it sinks further only by delay that was caused: the time for which a piece kept a decode step of another
      peer waiting. Below zero the peer's pieces are held while others decode, until it has refilled.

What others lose to one peer is thus its burst and then at most `share` of the time, and a step that takes one second
alone takes 1 / (1 - share) seconds. Where nobody else decodes nothing is held back and nothing is owed.
"""

from collections.abc import Collection
from dataclasses import dataclass

from swarm_protocol.ids import PeerId


@dataclass(frozen=True, slots=True)
class ShareLimits:
    """What a peer's pieces may cost the others."""

    burst_s: float = 2.0
    """Of device time: a prompt of 1,500 tokens for a small model on two cores, of far more on a GPU."""
    share: float = 0.125
    """Of the time, beyond the burst: others' steps take at most 1.15 times as long, where 1.2 is promised."""
    active_s: float = 3.0
    """So long after its last decode step a peer counts as decoding: a step that comes less often than every 3 s loses
    little by waiting for a piece, and a route over slow nodes comes back within that."""


@dataclass(slots=True)
class _Account:
    balance_s: float
    updated_s: float
    decoded_s: float = float("-inf")


class DeviceShares:
    """The accounts of all peers. Only the compute thread uses it."""

    def __init__(self, limits: ShareLimits | None = None) -> None:
        self.limits = limits or ShareLimits()
        self._accounts: dict[PeerId, _Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._accounts

    def balance_s(self, peer: PeerId, now_s: float) -> float:
        """Return what the peer has left, negative if it owes."""
        account = self._accounts.get(peer)
        return self.limits.burst_s if account is None else self._refilled(account, now_s)

    def is_over(self, peer: PeerId, now_s: float) -> bool:
        """Whether the peer has used up its burst."""
        # A tenth of it, so that one who takes every second that it is given stays over.
        return self.balance_s(peer, now_s) < self.limits.burst_s / 10

    def charge(self, peer: PeerId, taken_s: float, delay_s: float, now_s: float) -> None:
        """A piece of the peer took `taken_s` and kept another peer's decode step waiting for `delay_s` of it."""
        account = self._account(peer, now_s)
        account.balance_s = max(account.balance_s - taken_s, min(account.balance_s, 0.0) - delay_s)

    def decoded(self, peers: Collection[PeerId], now_s: float) -> None:
        """Decode steps of these peers run now."""
        for peer in peers:
            self._account(peer, now_s).decoded_s = now_s

    def wait_s(self, peer: PeerId, now_s: float) -> float:
        """Return for how long pieces of the peer are held; 0.0 if they may run."""
        balance_s = self.balance_s(peer, now_s)
        if balance_s >= 0.0:
            return 0.0
        last_s = max((own.decoded_s for other, own in self._accounts.items() if other != peer), default=float("-inf"))
        return max(0.0, min(-balance_s / self.limits.share, last_s + self.limits.active_s - now_s))

    def forget(self, now_s: float) -> None:
        """Drop the accounts that are as good as new, so that peers that come and go leave nothing."""
        for peer, account in list(self._accounts.items()):
            is_idle = account.decoded_s + self.limits.active_s < now_s
            if is_idle and self._refilled(account, now_s) >= self.limits.burst_s:
                del self._accounts[peer]

    def _account(self, peer: PeerId, now_s: float) -> _Account:
        account = self._accounts.get(peer)
        if account is None:
            account = self._accounts[peer] = _Account(self.limits.burst_s, now_s)
        account.balance_s, account.updated_s = self._refilled(account, now_s), max(now_s, account.updated_s)
        return account

    def _refilled(self, account: _Account, now_s: float) -> float:
        earned_s = self.limits.share * max(0.0, now_s - account.updated_s)
        return min(self.limits.burst_s, account.balance_s + earned_s)
