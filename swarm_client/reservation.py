"""Pure: how far ahead a session reserves KV cache."""

from swarm_protocol.messages import PAGE_TOKENS


def tokens_to_reserve(num_tokens: int, ahead: int, max_length: int) -> int:
    """Return the reservation for a session of `num_tokens` tokens that may grow to `max_length`: whole pages."""
    wanted = num_tokens + max(ahead, num_tokens // 4)
    return min(max_length, -(-wanted // PAGE_TOKENS) * PAGE_TOKENS)
