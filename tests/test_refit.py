"""Each last factor solved again on the inputs that the compressed layers before it give."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating
from ranksearch.refit import refit_last_factors
from ranksearch.surgery import replace_modules


def split_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    first, last = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    first.weight.data, last.weight.data = v[:rank].clone(), (u[:, :rank] * s[:rank]).clone()
    last.bias.data.zero_()
    return nn.Sequential(first, last)


def split_conv(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """A vertical and then a horizontal convolution."""
    first = nn.Conv2d(layer.in_channels, rank, (3, 1), stride=(2, 1), padding=(1, 0), bias=False)
    last = nn.Conv2d(rank, layer.out_channels, (1, 3), stride=(1, 2), padding=(0, 1))
    nn.init.zeros_(last.weight)
    return nn.Sequential(first, last)


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).eval()


def damaged(dense: nn.Sequential, rank: int, linear_rank: int) -> nn.Module:
    torch.manual_seed(1)
    parts = {
        "0": split_conv(dense[0], rank),
        "3": split_linear(dense[3], linear_rank),
        "5": split_linear(dense[5], linear_rank),
    }
    return replace_modules(copy.deepcopy(dense), parts)


LAST = {"0": "0.1", "3": "3.1", "5": "5.1"}


def output_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with evaluating(model):
        return call_model(model, inputs)


def test_the_dense_function_comes_back_where_the_first_factors_span_it():
    dense, inputs = a_network(), torch.randn(300, 3, 8, 8)
    model = damaged(dense, rank=9, linear_rank=4)  # 3 channels x 3 rows: nine filters lose nothing
    model[3] = split_linear(dense[3], 16)
    fresh = torch.randn(50, 3, 8, 8)
    results = refit_last_factors(model, LAST, dense, [(inputs[:100], None), (inputs[100:], None)], max_examples=300)
    assert torch.allclose(output_of(model, fresh), output_of(dense, fresh), atol=1e-3)
    assert results["0"].before > 0.5 and max(result.after for result in results.values()) < 1e-6


def test_the_error_shrinks_with_compressed_layers_upstream():
    dense, inputs, fresh = a_network(), torch.randn(400, 3, 8, 8), torch.randn(400, 3, 8, 8)
    model = damaged(dense, rank=5, linear_rank=3)
    wanted = output_of(dense, fresh)
    before = (output_of(model, fresh) - wanted).square().mean()
    results = refit_last_factors(model, LAST, dense, [(inputs, None)], max_examples=400)
    after = (output_of(model, fresh) - wanted).square().mean()
    assert after < 0.5 * before
    assert set(results) == set(LAST) and all(result.after <= result.before for result in results.values())
    assert all(not module._forward_hooks for module in [*model.modules(), *dense.modules()])


def test_later_layers_see_the_corrected_inputs():
    dense, inputs = a_network(), torch.randn(300, 3, 8, 8)
    model = damaged(dense, rank=9, linear_rank=4)
    results = refit_last_factors(model, LAST, dense, [(inputs, None)], max_examples=300)
    seen = output_of(model[:3], inputs)
    rows, wanted = output_of(model[3][0], seen), output_of(dense[:4], inputs)
    error = (output_of(model[3][1], rows) - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
    assert results["3"].after == pytest.approx(float(error), rel=1e-3)
    repeated = refit_last_factors(model, LAST, dense, [(inputs, None)], max_examples=300)
    assert all(repeated[name].after == pytest.approx(results[name].after, rel=1e-3, abs=1e-6) for name in LAST)


def test_a_sample_of_rows_serves():
    dense, inputs = a_network(), torch.randn(300, 3, 8, 8)
    model = damaged(dense, rank=9, linear_rank=16)
    results = refit_last_factors(model, {"0": "0.1"}, dense, [(inputs, None)], max_rows=500)
    assert results["0"].after < 1e-6
    same = damaged(dense, rank=9, linear_rank=16)
    refit_last_factors(same, {"0": "0.1"}, dense, [(inputs, None)], max_rows=500)
    assert torch.equal(same[0][1].weight, model[0][1].weight), "the sample is that of the seed"


def test_what_cannot_be_refitted_is_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.layer(first) + self.layer(second)

    dense = Twice().eval()
    model = replace_modules(copy.deepcopy(dense), {"layer": split_linear(dense.layer, 2)})
    before = model.layer[1].weight.clone()
    inputs = {"first": torch.randn(9, 4), "second": torch.randn(9, 4)}
    assert refit_last_factors(model, {"layer": "layer.1"}, dense, [(inputs, None)]) == {}
    assert torch.equal(model.layer[1].weight, before)

    network, few = a_network(), torch.randn(3, 3, 8, 8)
    compressed = damaged(network, rank=9, linear_rank=4)
    assert set(refit_last_factors(compressed, LAST, network, [(few, None)])) == {"0"}  # three rows for four weights
    with pytest.raises(StudyError, match="yields no example"):
        refit_last_factors(compressed, LAST, network, [])
