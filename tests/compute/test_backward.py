"""A backward pass in pieces gives the gradients of the blocks, also of quantized ones; decode steps run between."""

import asyncio

import pytest
import torch

from app.demo import find_model
from server_node.compute.backward import BackwardPass, backward_cost
from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.quantization import scheme_of
from server_node.compute.scheduler import BatchLimits
from server_node.compute.work import AllocateWork, BackwardWork, StepWork
from server_node.compute.worker import ComputeWorker
from swarm_protocol.errors import BlocksNotServedError, InvalidTensorError
from swarm_protocol.ids import PeerId
from swarm_protocol.model import open_checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from tests.node.node_scenario import HIDDEN, SPAN, tiny_span

TRAINER, CHATTER = PeerId("a trainer"), PeerId("a chatter")


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(runner: BlockRunner, entering: torch.Tensor, gradients: torch.Tensor, blocks: Span) -> torch.Tensor:
    leaf = entering.clone().requires_grad_()
    (found,) = torch.autograd.grad(runner.module(leaf, blocks=blocks), leaf, gradients)
    return found


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("blocks", [SPAN, Span(SPAN.start, SPAN.start + 1), Span(SPAN.start + 1, SPAN.end)])
def test_pieces_of_any_size_give_the_gradients_of_the_blocks(most: int, blocks: Span) -> None:
    runner = BlockRunner(tiny_span())
    entering, gradients = states(2, 5, HIDDEN), states(2, 5, HIDDEN, seed=1)
    with torch.inference_mode():  # as the device thread runs everything
        whole, cost = BackwardPass(runner, blocks, entering.clone(), gradients.clone()), 0
        while cost < backward_cost(len(blocks)):
            cost += whole.run(most)
        assert whole.run(most) == 0
    assert cost == backward_cost(len(blocks))
    torch.testing.assert_close(whole.gradients, by_autograd(runner, entering, gradients, blocks))


def test_blocks_that_are_not_here_are_refused() -> None:
    with pytest.raises(BlocksNotServedError):
        BackwardPass(BlockRunner(tiny_span()), Span(0, SPAN.end + 1), states(1, 2, HIDDEN), states(1, 2, HIDDEN))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("int8", torch.bfloat16), ("nf4", torch.bfloat16)]
)
def test_quantized_blocks_have_the_gradients_of_what_they_compute(kind: str, dtype: torch.dtype) -> None:
    checkpoint, cpu, span = open_checkpoint(str(find_model())), torch.device("cpu"), Span(3, 5)
    runner = load_blocks(checkpoint, span, dtype=dtype, device=cpu, scheme=scheme_of(kind, cpu))
    plain = load_blocks(checkpoint, span, dtype=torch.float32, device=cpu)
    entering, gradients = states(1, 12, 576), states(1, 12, 576, seed=1)
    with torch.inference_mode():
        whole = BackwardPass(runner, span, runner.placed(entering), runner.placed(gradients))
        whole.run(100)
    wanted = by_autograd(plain, entering, gradients, span)
    # Random states are no text: 8 bits of the weights and of what goes into them are 6 % of these gradients.
    assert ((whole.gradients.float() - wanted).norm() / wanted.norm()).item() < 0.1
    torch.testing.assert_close(
        whole.gradients, by_autograd(runner, runner.placed(entering), runner.placed(gradients), span)
    )


@pytest.fixture
def worker() -> ComputeWorker:
    # A piece is one block: a pass of 3 blocks takes 5 of them.
    return ComputeWorker(runner=BlockRunner(tiny_span()), limits=BatchLimits(chunk_tokens=1))


def test_decode_steps_run_between_the_pieces_of_a_pass(worker: ComputeWorker) -> None:
    async def run() -> tuple[int, torch.Tensor]:
        cache = await worker.run(AllocateWork(SPAN, 1, 64, CHATTER))
        await worker.run(StepWork(cache, SPAN, 0, to_wire(states(1, 1, HIDDEN)), owner=CHATTER))
        work = BackwardWork(SPAN, to_wire(states(2, 30, HIDDEN)), to_wire(states(2, 30, HIDDEN, seed=1)), TRAINER)
        training = asyncio.create_task(worker.run(work))
        steps = 0
        while not training.done() and steps < 60:
            await worker.run(StepWork(cache, SPAN, 1 + steps, to_wire(states(1, 1, HIDDEN)), owner=CHATTER))
            steps += 1
        return steps, from_wire((await training).hidden_states)

    steps, found = asyncio.run(run())
    worker.close()
    assert steps >= 2
    wanted = by_autograd(BlockRunner(tiny_span()), states(2, 30, HIDDEN), states(2, 30, HIDDEN, seed=1), SPAN)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("what", ["hidden_states", "gradients"])
def test_values_that_are_not_finite_are_refused(worker: ComputeWorker, what: str) -> None:
    tensors = {"hidden_states": states(1, 3, HIDDEN), "gradients": states(1, 3, HIDDEN)}
    tensors[what][0, 1, 2] = torch.nan
    work = BackwardWork(SPAN, to_wire(tensors["hidden_states"]), to_wire(tensors["gradients"]), TRAINER)
    with pytest.raises(InvalidTensorError, match="finite"):
        asyncio.run(worker.run(work))
    worker.close()


def test_a_pass_that_nobody_waits_for_any_more_is_dropped(worker: ComputeWorker) -> None:
    async def run() -> torch.Tensor:
        work = BackwardWork(SPAN, to_wire(states(4, 60, HIDDEN)), to_wire(states(4, 60, HIDDEN)), TRAINER)
        training = asyncio.create_task(worker.run(work))
        await asyncio.sleep(0.01)
        training.cancel()
        cache = await worker.run(AllocateWork(SPAN, 1, 8, CHATTER))
        output = await worker.run(StepWork(cache, SPAN, 0, to_wire(states(1, 1, HIDDEN)), owner=CHATTER))
        return from_wire(output.hidden_states)

    found = asyncio.run(run())
    worker.close()
    torch.testing.assert_close(found, BlockRunner(tiny_span()).forward(states(1, 1, HIDDEN), SPAN))
