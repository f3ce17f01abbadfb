"""Signed tokens by which a session of an embedded chat says which widget key it belongs to.

An embed page is an ordinary page to the browser: its websocket carries the site's own Origin, like the chat page's. The
token ties the session to the key whose model, prompt and limits apply. It lives ten minutes and only where it was given
out, so that it is worth little elsewhere; who loads the embed page gets another one. A key is no secret, and a program
can use it outside of any browser: limits bound that, not the token.
"""

import ipaddress
from collections.abc import Sequence

from itsdangerous import BadSignature, URLSafeTimedSerializer

TOKEN_LIFE_S = 600  # a page that is open for longer fetches another one
SALT = "umbel embed token 1"
IPV4_PREFIX, IPV6_PREFIX = 24, 48  # what stays of an address when a provider changes it; /48 is one customer


def address_prefix(address: str) -> str:
    """Return the network that an address is in; the text itself where it is no address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    length = IPV4_PREFIX if found.version == 4 else IPV6_PREFIX
    return str(ipaddress.ip_network((found, length), strict=False))


class EmbedTokens:
    """Makes and reads tokens. Any thread."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`secrets` are the site's, the newest last: it signs, and those before it are still believed."""
        self._serializer = URLSafeTimedSerializer(list(secrets), salt=SALT)

    def make(self, key: str, address: str) -> str:
        """Return a token for a reader at `address` of the page that has a widget key."""
        return str(self._serializer.dumps([key, address_prefix(address)]))

    def read(self, token: str, address: str) -> str | None:
        """Return the key of a token; None if it is forged, too old, or was given to somebody elsewhere."""
        try:
            found = self._serializer.loads(token, max_age=TOKEN_LIFE_S)
        except BadSignature:  # an expired one is one of them
            return None
        if not isinstance(found, list) or len(found) != 2 or found[1] != address_prefix(address):
            return None
        return str(found[0])
