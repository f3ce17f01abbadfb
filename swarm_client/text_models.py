"""One call from a source and a peer to a model that answers text."""

from collections.abc import Sequence

from swarm_client.config import ClientConfig
from swarm_client.generation.text_session import TextModel
from swarm_client.model import AutoDistributedModelForCausalLM
from swarm_client.swarm import Swarm


def open_text_model(
    source: str,
    initial_peers: Sequence[str] = (),
    *,
    swarm: Swarm | None = None,
    config: ClientConfig | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> TextModel:
    """Return the model of `source` with its blocks in the swarm of `initial_peers`, or over the connection `swarm`.

    Blocks while it loads, the draft model of `ClientConfig`, too. Raises as
    `AutoDistributedModelForCausalLM.from_pretrained` does.
    """
    model = AutoDistributedModelForCausalLM.from_pretrained(
        source,
        initial_peers=initial_peers,
        swarm=swarm,
        config=config,
        revision=revision,
        cache_dir=cache_dir,
        dtype=dtype,
        device=device,
    )
    try:
        text_model = model.text_model()
        text_model.prepare()
        return text_model
    except BaseException:
        model.close()
        raise
