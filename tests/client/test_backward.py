"""Gradients come back through the swarm as from transformers' own model: every family, padding, and nodes that die."""

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from swarm_client import AutoDistributedModelForCausalLM, DistributedCausalLM
from swarm_protocol.errors import InvalidRequestError, MissingBlocksError
from swarm_protocol.spans import Span
from tests.client.test_model import Pair, ids, padded
from tests.local_swarm import CLIENT_CONFIG, LocalSwarm
from tests.tiny_models import TINY_CONFIGS, save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("llama", tmp_path_factory.mktemp("llama"))
    with pair.served:
        yield pair


def gradients(model: PreTrainedModel, token_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Those of the embeddings' weights for the usual loss; padding is left out of it, and what it would predict."""
    weight = model.get_input_embeddings().weight
    labels = token_ids.clone()
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100
    weight.requires_grad_(True)
    try:
        model(input_ids=token_ids, attention_mask=mask, labels=labels).loss.backward()
        assert weight.grad is not None
        return weight.grad.clone()
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 0
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-4


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = Pair(name, tmp_path_factory.mktemp(name))
    with pair.served:
        pair.local.requires_grad_(False)
        found, wanted = gradients(pair.remote, ids(2, 9)), gradients(pair.local, ids(2, 9))
    assert_same(found, wanted)


def test_rows_with_padding_on_either_side_are_trained(llama: Pair) -> None:
    token_ids, mask = padded()
    assert_same(gradients(llama.remote, token_ids, mask), gradients(llama.local, token_ids, mask))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    token_ids = ids(3)
    assert_same(gradients(llama.remote, token_ids, mask), gradients(llama.local, token_ids, mask))


def test_micro_batches_give_what_the_batch_does(llama: Pair) -> None:
    swarm = llama.served.swarm
    wanted = gradients(llama.local, ids(9, 6))
    chosen, swarm.config = swarm.config, replace(swarm.config, step_tokens=12)
    try:
        assert_same(gradients(llama.remote, ids(9, 6)), wanted)
    finally:
        swarm.config = chosen


def test_gradients_flow_to_a_soft_prompt(llama: Pair) -> None:
    soft = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(5))
    found = []
    for model in (llama.remote, llama.local):
        prompt = soft.clone().requires_grad_()
        embeds = torch.cat([prompt, model.get_input_embeddings()(ids())], dim=1)
        labels = torch.cat([torch.full((1, 3), -100), ids()], dim=1)
        model(inputs_embeds=embeds, labels=labels).loss.backward()
        assert prompt.grad is not None
        found.append(prompt.grad)
    assert_same(found[0], found[1])


def test_a_loss_of_hidden_states_is_trained_and_spans_are_seen(llama: Pair) -> None:
    embeds = llama.remote.get_input_embeddings()(ids()).detach().requires_grad_()
    output = llama.remote(inputs_embeds=embeds, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    output.logits.float().square().mean().backward()
    wanted = embeds.detach().clone().requires_grad_()
    llama.local(inputs_embeds=wanted).logits.float().square().mean().backward()
    assert embeds.grad is not None
    assert wanted.grad is not None
    assert_same(embeds.grad, wanted.grad)


def test_nothing_is_kept_where_no_gradients_are_wanted(llama: Pair) -> None:
    output = llama.remote(ids()).logits
    assert not output.requires_grad


def test_a_session_has_no_gradients(llama: Pair) -> None:
    embeds = llama.remote.ends.embed(ids()).detach().requires_grad_()
    with llama.remote.inference_session(max_length=20), pytest.raises(InvalidRequestError, match="session"):
        llama.remote(inputs_embeds=embeds)


# nodes that die


@pytest.fixture
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("trio")
    local = save_tiny_model("llama", folder)
    local.requires_grad_(False)
    config = replace(CLIENT_CONFIG, step_tokens=8, max_wait_s=1.0)
    with LocalSwarm(folder, [Span(0, 2), Span(2, 5), Span(2, 5)], config=config) as swarm:
        yield swarm, AutoDistributedModelForCausalLM.from_pretrained(str(folder), swarm=swarm.swarm), local


def test_a_node_killed_between_forward_and_back_costs_no_gradient(
    trio: tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel],
) -> None:
    swarm, remote, local = trio
    weight = remote.get_input_embeddings().weight.requires_grad_(True)
    loss = remote(input_ids=ids(6, 8), labels=ids(6, 8)).loss
    swarm.kill(swarm.nodes[1])
    loss.backward()
    assert_same(weight.grad, gradients(local, ids(6, 8)))


def test_shorter_spans_take_the_place_of_a_node_on_the_way_back(
    trio: tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel],
) -> None:
    swarm, remote, local = trio
    weight = remote.get_input_embeddings().weight.requires_grad_(True)
    loss = remote(input_ids=ids(3, 8), labels=ids(3, 8)).loss
    swarm.add_node(Span(2, 4))
    swarm.add_node(Span(4, 5))
    swarm.kill(swarm.nodes[1])
    swarm.kill(swarm.nodes[2])
    loss.backward()
    assert_same(weight.grad, gradients(local, ids(3, 8)))


def test_nodes_killed_again_and_again_change_no_gradient(
    trio: tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel],
) -> None:
    swarm, remote, local = trio
    wanted = gradients(local, ids(8, 8))
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            victim = swarm.nodes[-2]
            swarm.add_node(Span(2, 5))
            swarm.kill(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(4):
            assert_same(gradients(remote, ids(8, 8)), wanted)
    finally:
        stop.set()
        killer.join()


def test_blocks_that_nobody_serves_any_more_are_named(
    trio: tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel],
) -> None:
    swarm, remote, _ = trio
    remote.get_input_embeddings().weight.requires_grad_(True)
    loss = remote(input_ids=ids(1, 8), labels=ids(1, 8)).loss
    swarm.stop(swarm.nodes[0])
    with pytest.raises(MissingBlocksError):
        loss.backward()


def test_a_copy_of_the_model_trains_over_the_same_connection(llama: Pair) -> None:
    assert_same(gradients(copy.deepcopy(llama.remote), ids()), gradients(llama.local, ids()))
