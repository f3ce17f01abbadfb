"""Sessions that open small and are extended, and sessions that begin with what an earlier one computed."""

from swarm_protocol.messages import PAGE_TOKENS, CloseSession, SessionClosed, SessionResumed, Step
from swarm_protocol.tensors import to_wire
from tests.node.node_scenario import (
    CACHE_TOKENS,
    assert_error,
    assert_output,
    local_output,
    resume,
    serving_node,
    settle,
    states,
    virtual,
)

PREFIX = (b"a" * 16, b"b" * 16)


@virtual
async def test_a_step_extends_the_reservation_first():
    async with serving_node() as node:
        talk, _ = await node.open(max_tokens=4)
        tokens = states(30)
        assert_output(await talk.step(1, 0, tokens[:, :4]), local_output(tokens[:, :4]))
        assert_error(await talk.step(2, 4, tokens[:, 4:]), "max_length_exceeded", step_id=2)
        assert node.free_tokens == CACHE_TOKENS - 4
        assert_output(await talk.step(2, 4, tokens[:, 4:], max_tokens=32), local_output(tokens)[:, 4:])
        assert node.free_tokens == CACHE_TOKENS - 32
        await talk.ask(CloseSession())
        assert node.free_tokens == CACHE_TOKENS
        await talk.stream.close()
        await node.assert_clean()


@virtual
async def test_an_extension_that_is_refused_changes_nothing_and_counts_as_a_step():
    async with serving_node() as node:
        other, _ = await node.open(max_tokens=80, session_id=b"o" * 16)
        talk, _ = await node.open(max_tokens=4)
        tokens = states(21)
        await talk.step(1, 0, tokens[:, :4])
        refused = await talk.step(2, 4, tokens[:, 4:], max_tokens=21)
        assert_error(refused, "cache_full", step_id=2)
        assert refused.retryable
        assert node.free_tokens == CACHE_TOKENS - 84
        assert_output(await talk.step(3, 4, tokens[:, 4:20], max_tokens=20), local_output(tokens[:, :20])[:, 4:])
        assert isinstance(await other.ask(CloseSession()), SessionClosed)
        assert_output(await talk.step(4, 20, tokens[:, 20:], max_tokens=21), local_output(tokens)[:, 20:])


@virtual
async def test_a_step_that_cannot_be_served_extends_nothing():
    async with serving_node() as node:
        talk, _ = await node.open(max_tokens=4)
        assert_error(await talk.step(1, 0, states(3, rows=2), max_tokens=50), "invalid_tensor", step_id=1)
        assert_error(await talk.step(7, 0, states(3), max_tokens=50), "step_order", step_id=7)
        assert node.free_tokens == CACHE_TOKENS - 4


@virtual
async def test_a_step_that_is_sent_again_extends_once():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer, max_tokens=4)
        tokens = states(10)
        await talk.step(1, 0, tokens, max_tokens=12)
        await talk.stream.close()
        await settle()
        again = await node.dial(peer)
        assert isinstance(await again.ask(resume(opened, 1)), SessionResumed)
        assert_output(await again.ask(Step(1, 0, to_wire(tokens), max_tokens=12)), local_output(tokens))
        assert node.free_tokens == CACHE_TOKENS - 12


@virtual
async def test_a_session_begins_where_an_earlier_one_of_the_peer_was():
    async with serving_node() as node:
        node.worker.keep_prefixes(1 << 30)
        node.node.admission.free_token_blocks = 1 << 20
        peer = node.network.transport()
        tokens = states(2 * PAGE_TOKENS + 3)
        talk, opened = await node.open(peer, max_tokens=140, prefix=PREFIX)
        assert opened.cached_tokens == 0
        await talk.step(1, 0, tokens)
        await talk.ask(CloseSession())
        later, opened = await node.open(peer, max_tokens=140, prefix=PREFIX)
        assert opened.cached_tokens == 2 * PAGE_TOKENS
        rest = tokens[:, opened.cached_tokens :]
        assert_output(await later.step(1, 2 * PAGE_TOKENS, rest), local_output(tokens)[:, -3:])
        assert_output(await later.step(2, 5, tokens[:, 5:9]), local_output(tokens[:, :9])[:, 5:])


@virtual
async def test_another_peer_finds_nothing_and_neither_does_a_session_of_several_rows():
    async with serving_node() as node:
        node.worker.keep_prefixes(1 << 30)
        node.node.admission.free_token_blocks = 1 << 20
        peer = node.network.transport()
        talk, _ = await node.open(peer, max_tokens=140, prefix=PREFIX)
        await talk.step(1, 0, states(2 * PAGE_TOKENS))
        _, opened = await node.open(max_tokens=140, prefix=PREFIX)
        assert opened.cached_tokens == 0
        _, opened = await node.open(peer, max_tokens=140, batch_size=2, prefix=PREFIX, session_id=b"r" * 16)
        assert opened.cached_tokens == 0
