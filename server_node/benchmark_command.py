"""`umbel-node benchmark`: what a node with the same flags would measure of its blocks, without any network."""

import shutil

from server_node.admission import ServedSpan
from server_node.benchmark import figures_of_this_machine, measure_speed
from server_node.capacity import cache_tokens_to_reserve, num_blocks_to_hold
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeConfig
from server_node.figure_store import FOLDER
from server_node.figures import figures_table
from server_node.progress import show_progress
from server_node.speed import SpeedMeter
from swarm_protocol.errors import InternalError
from swarm_protocol.model.hub import cache_folder
from swarm_protocol.spans import Span
from swarm_protocol.tensors import dtype_name


async def benchmark(config: NodeConfig, *, is_fresh: bool) -> str:
    """Return a table of what is known of the blocks, or of what is measured now; `is_fresh` forgets all that is known.

    Raises ConfigError, ModelError or OSError as `run` does, InternalError if the blocks cannot be measured.
    """
    choice, compute = config.model, config.compute
    if is_fresh:
        shutil.rmtree(cache_folder(choice.cache_dir) / FOLDER, ignore_errors=True)
    worker = ComputeWorker(num_threads=compute.threads)
    try:
        model = await worker.open_model(
            choice,
            device=compute.device,
            dtype=compute.dtype,
            quantization=compute.quantization,
            on_download=show_progress(f"downloading {choice.source}", "B"),
        )
        span = choice.blocks or Span(0, num_blocks_to_hold(choice, model))
        store = figures_of_this_machine(config)
        figures = store.read(store.key(model.checkpoint.name, model.numerics, len(span)))
        if figures is None:
            loaded = await worker.load(model, span, compute.device, show_progress(f"loading {choice.source}", "block"))
            tokens = cache_tokens_to_reserve(compute.cache_tokens, loaded)
            name, revision = model.checkpoint.name, model.checkpoint.revision
            served = ServedSpan(name, revision, span, loaded.hidden_size, loaded.dtype, tokens, model.numerics)
            speed = SpeedMeter()
            await measure_speed(worker, served, speed, store)
            figures = speed.figures
    finally:
        worker.close()
    if figures is None:
        raise InternalError("the blocks could not be measured; the log says why")
    return f"{model.checkpoint.name} blocks {span} in {dtype_name(model.dtype)}\n{figures_table(figures, len(span))}"
