"""Pure: lengths of time as people give them to commands."""

import re

from swarm_protocol.errors import ConfigError

_UNITS_S = {"m": 60, "h": 3600, "d": 86_400}


def parse_duration_s(text: str) -> float:
    """Return `30m`, `12h` or `90d` in seconds. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text.strip())
    if found is None:
        raise ConfigError(f"{text[:40]!r} is no length of time; it is in minutes, hours or days: 30m, 12h, 90d")
    return float(int(found[1]) * _UNITS_S[found[2]])
