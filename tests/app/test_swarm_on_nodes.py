"""What is said of a swarm of real nodes, on the network in memory, while one of them leaves."""

import time
from pathlib import Path

from app.swarm_report import Circumstances, ModelReport, model_report
from swarm_client.block_size import block_size
from swarm_client.routing.find_route import ModelKey
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.spans import Span
from tests.local_swarm import LocalSwarm
from tests.tiny_models import NUM_BLOCKS, save_tiny_model


def test_a_node_that_leaves_is_missed_and_one_that_comes_is_seen(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    key = ModelKey(checkpoint.name, checkpoint.revision, NUM_BLOCKS)
    size = block_size(checkpoint)

    with LocalSwarm(tmp_path, [Span(0, 2), Span(2, NUM_BLOCKS)]) as served:

        def report() -> ModelReport:
            return model_report(served.swarm.seen(key), size, Circumstances(128, 0, None, "0.1.0"))

        def wait_for(state: str) -> ModelReport:
            deadline_s = time.monotonic() + 60
            while (found := report()).state != state:
                assert time.monotonic() < deadline_s, found
                time.sleep(0.05)
            return found

        found = wait_for("degraded")
        assert found.replicas == (1,) * NUM_BLOCKS
        assert found.tokens_per_s is not None
        assert found.tokens_per_s > 0
        assert {(node.short_id, node.dtype, node.state) for node in found.nodes} == {
            (peer_id[-6:], "float32", "online") for peer_id in served.nodes
        }
        assert all(node.tokens_per_s and node.cache_free == 1.0 for node in found.nodes)

        served.stop(served.nodes[1])
        found = wait_for("incomplete")
        assert found.missing == (Span(2, NUM_BLOCKS),)
        assert found.needed is not None
        assert found.needed.plain_bytes == round(1.5 * 3 * size.plain_bytes)

        served.add_node(Span(0, NUM_BLOCKS))
        found = wait_for("degraded")
        assert found.replicas == (2, 2, 1, 1, 1)
        assert found.weakest == (Span(2, NUM_BLOCKS),)
