"""Linear layers for a few rows compute what torch's own do, and share its weights."""

import pytest
import torch
from torch import nn

from swarm_protocol.model import few_rows
from swarm_protocol.model.few_rows import FewRowsLinear, Way, speed_up


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 320, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("way", [Way(3), Way(4), Way(4, True), Way(3, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_gives_the_plain_product(way: Way, bias: bool) -> None:
    linear = layer(bias)
    fast = FewRowsLinear(linear, {3: way})
    rows = torch.randn(3, 1, 256)
    with torch.inference_mode():
        found = fast(rows)
        torch.testing.assert_close(found, linear(rows), rtol=1e-5, atol=1e-6)
        assert found.is_contiguous()
        assert torch.equal(fast(torch.ones(2, 7, 256)), linear(torch.ones(2, 7, 256)))


def test_gradients_flow_to_the_input() -> None:
    linear = layer()
    fast = FewRowsLinear(linear, {1: Way(2, True)})
    rows = torch.randn(1, 256, requires_grad=True)
    fast(rows).sum().backward()
    torch.testing.assert_close(rows.grad, linear.weight.sum(0, keepdim=True))


def test_a_layer_that_was_converted_after_it_was_measured_still_works() -> None:
    fast = FewRowsLinear(layer(), {1: Way(2, True)}).to(torch.bfloat16)
    with torch.inference_mode():
        assert fast(torch.ones(1, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_large_layers_are_replaced_in_place_and_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_MIN_GAIN", 0.0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(layer()), layer().to(torch.bfloat16))
    weight, bias, names = module[1][0].weight, module[1][0].bias, list(module.state_dict())
    rows = torch.randn(5, 256)
    wanted = module[1](rows)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert speed_up(module) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert type(module[0]) is nn.Linear
    assert type(module[2]) is nn.Linear
    replaced = module[1][0]
    assert isinstance(replaced, FewRowsLinear)
    assert replaced.weight is weight
    assert replaced.bias is bias
    assert list(module.state_dict()) == names
    with torch.inference_mode():
        torch.testing.assert_close(module[1](rows), wanted, rtol=1e-5, atol=1e-6)


def test_nothing_is_replaced_where_nothing_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_MIN_GAIN", float("inf"))
    module = nn.Sequential(layer())
    assert speed_up(module) == 0
    assert type(module[0]) is nn.Linear


def test_a_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_MIN_GAIN", 0.0)
    right = Way.product

    def wrong(way: Way, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return right(way, rows, weight) * (1.01 if way.is_weight_first else 1.0)

    monkeypatch.setattr(Way, "product", wrong)
    module = nn.Sequential(layer())
    speed_up(module)
    assert not any(way.is_weight_first for way in module[0]._ways.values())
