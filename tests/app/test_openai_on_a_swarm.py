"""The OpenAI-compatible API in front of real nodes: the same tokens as transformers, cached prompts, nothing left."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flask.testing import FlaskClient

from app.config import SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from server_node.admission import Admission
from server_node.node import Node
from swarm_client.generation.text_model import DistributedTextModel
from swarm_protocol.ids import short_peer
from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.spans import Span
from tests.client.test_model import Pair
from tests.client.test_text_sessions import Words, local_text

CACHE_TOKENS = 2048
CHAT = "/v1/chat/completions"

ledgers: list[Admission] = []
"""Those of the nodes that run."""


class WatchedNode(Node):
    """A node whose ledger can be looked at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        ledgers.append(self.admission)


class NamedWords(Words):
    """A tokenizer of numbers that also has a name for each."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return str(token_id)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3] if text == "a" else super().encode(text)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_node.life.Node", WatchedNode)
        folder, changes = tmp_path_factory.mktemp("llama"), {"max_position_embeddings": 2048}
        pair = Pair("llama", folder, changes, cache_tokens=CACHE_TOKENS, prefix_tokens=1024)
        with pair.served:
            yield pair
    ledgers.clear()


@pytest.fixture
def client(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: NamedWords())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    model: DistributedTextModel = pair.remote.text_model()
    app = create_app(SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    yield app.test_client()
    wait_until_free()


def wait_until_free(timeout_s: float = 20.0) -> None:
    """Wait until nothing is reserved at the nodes and no generation runs."""
    deadline_s = time.monotonic() + timeout_s
    while any(ledger.free_tokens < CACHE_TOKENS for ledger in ledgers) or any(
        thread.name == "umbel-http-generation" for thread in threading.enumerate()
    ):
        assert time.monotonic() < deadline_s, [ledger.free_tokens for ledger in ledgers]
        time.sleep(0.02)


def chat_body(ids: list[int], **fields: object) -> dict[str, object]:
    message = {"role": "user", "content": Words().decode(ids)}
    return {"messages": [message], "temperature": 0, "max_tokens": 5, **fields}


def test_answers_are_those_of_the_whole_model(pair: Pair, client: FlaskClient) -> None:
    ids = [5, 17, 31]
    wanted = local_text(pair, [*ids, 90, 91], 5)
    found = client.post(CHAT, json=chat_body(ids, logprobs=True, top_logprobs=2)).json
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (wanted, "length")
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == wanted
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] < 0 for token in tokens)
    assert found["usage"]["prompt_tokens"] == 5
    for prompt in (Words().decode(ids), ids):
        plain = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 5}).json
        assert plain["choices"][0]["text"] == local_text(pair, ids, 5)
    begun = local_text(pair, [*ids, 90, 91], 2)
    body = {**chat_body(ids, max_tokens=3), "continue_final_message": True}
    body["messages"] = [*chat_body(ids)["messages"], {"role": "assistant", "content": "91" + begun}]
    assert begun + client.post(CHAT, json=body).json["choices"][0]["message"]["content"] == wanted
    unknown = client.post("/v1/completions", json={"prompt": [10**6]})
    assert (unknown.status_code, unknown.json["error"]["code"]) == (400, "invalid_request")


def test_a_conversation_that_goes_on_is_not_computed_again(client: FlaskClient) -> None:
    ids = [1 + token % 80 for token in range(2 * PAGE_TOKENS)]
    first = client.post(CHAT, json=chat_body(ids)).json
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    body = chat_body(ids)
    body["messages"] += [answer, {"role": "user", "content": "9 9"}]
    again = client.post(CHAT, json=body).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * PAGE_TOKENS
    assert again["timings"]["prompt_n"] == again["usage"]["prompt_tokens"] - 2 * PAGE_TOKENS


def test_embeddings_are_those_of_the_whole_model(pair: Pair, client: FlaskClient) -> None:
    texts = [[5, 17, 31], [9], [4, 4, 4]]
    data = client.post("/v1/embeddings", json={"input": [Words().decode(ids) for ids in texts]}).json["data"]
    for ids, found in zip(texts, data, strict=True):
        with torch.no_grad():
            states = pair.local.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        wanted = torch.nn.functional.normalize(states, dim=0)
        assert torch.allclose(torch.tensor(found["embedding"]), wanted, atol=1e-5)
    unknown = client.post("/v1/embeddings", json={"input": [10**6]})
    assert (unknown.status_code, unknown.json["error"]["code"]) == (400, "invalid_request")


def test_a_client_that_leaves_frees_the_nodes_while_a_step_hangs(pair: Pair, client: FlaskClient) -> None:
    ids = [7, 8, 9]
    assert client.post(CHAT, json=chat_body(ids)).status_code == 200
    frozen = pair.served.nodes[1]
    pair.served.freeze(frozen, is_frozen=True)
    try:
        response = client.post(CHAT, json=chat_body(ids, stream=True))
        assert response.status_code == 200
        response.close()
        deadline_s = time.monotonic() + 15  # a step may take 20 s
        while any(thread.name == "umbel-http-generation" for thread in threading.enumerate()):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        pair.served.freeze(frozen, is_frozen=False)
    wait_until_free()
    assert client.post(CHAT, json=chat_body(ids)).status_code == 200


def test_a_lost_node_is_told_and_changes_no_token(pair: Pair, client: FlaskClient) -> None:
    ids, blocks = [11, 12, 13], Span(2, pair.local.config.num_hidden_layers)
    nodes = {pair.served.nodes[1]: ledgers[1], pair.served.add_node(blocks): ledgers[2]}
    body = chat_body(ids, stream=True, max_tokens=200, stream_options={"include_events": True})
    pieces = client.post(CHAT, json=body).iter_encoded()
    text, events = "", []
    for piece in pieces:
        if piece.startswith(b"data: {"):
            chunk = json.loads(piece[6:])
            assert "error" not in chunk
            events += [chunk["umbel_event"]] if "umbel_event" in chunk else []
            is_first = not text
            text += chunk["choices"][0]["delta"].get("content", "")
            if is_first and text:  # at most the queue's 64 tokens are ahead
                (peer,) = [part["peer"] for part in events[-1]["route"] if part["blocks"] == str(blocks)]
                (lost,) = [node for node in nodes if short_peer(node) == peer]
                pair.served.kill(lost)
                ledgers.remove(nodes[lost])
    assert text == local_text(pair, [*ids, 90, 91], 200)
    assert "recovered" in [event["type"] for event in events]
    assert peer in [part["peer"] for event in events[1:] if event["type"] == "route_changed" for part in event["left"]]
