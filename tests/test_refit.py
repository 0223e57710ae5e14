"""Each last factor solved again on the inputs that the compressed layers before it give."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import Conv1D, as_linear
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating
from ranksearch.refit import refit_last_factors
from ranksearch.statistics.least_squares import solve_centred
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
    held_out = torch.arange(300) % 4 == 1
    found = solve_centred(
        *(part[~held_out].double()[None] for part in (rows, wanted)), torch.zeros(1, 16, 4).double(), 1e-5
    )
    left = rows[held_out].double() @ found[0][0].T + found[1][0] - wanted[held_out]
    error = left.square().mean() / (wanted[held_out] - wanted[held_out].mean(0)).square().mean()
    assert results["3"].after == pytest.approx(float(error), rel=1e-3)
    repeated = refit_last_factors(model, LAST, dense, [(inputs, None)], max_examples=300)
    assert all(repeated[name].after <= 1.001 * results[name].after + 1e-6 for name in LAST)


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
    assert set(refit_last_factors(compressed, LAST, network, [(few, None)])) == {"0"}  # two rows for four weights
    assert refit_last_factors(compressed, LAST, network, [(few[:1], None)]) == {}  # nothing to hold out
    with pytest.raises(StudyError, match="yields no example"):
        refit_last_factors(compressed, LAST, network, [])


def as_blueprint(layer: nn.Conv2d) -> nn.Sequential:
    """Channels mixed, then each filtered alone: exact where every kernel of an output is one image."""
    first = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False)
    last = nn.Conv2d(layer.out_channels, layer.out_channels, 3, padding=1, groups=layer.out_channels)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, last)


def blueprint_network() -> tuple[nn.Sequential, nn.Sequential]:
    """A convolution that a blueprint gives exactly, and the blueprint with noise on its last factor."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()).eval()
    mixing, images = torch.randn(6, 3), torch.randn(6, 3, 3)
    dense[0].weight.data = mixing[:, :, None, None] * images[:, None]
    model = replace_modules(copy.deepcopy(dense), {"0": as_blueprint(dense[0])})
    model[0][0].weight.data = mixing[:, :, None, None].clone()
    model[0][1].weight.data = images[:, None] + 0.5 * torch.randn(6, 1, 3, 3)
    return dense, model


def test_a_last_factor_in_groups_is_solved_group_by_group():
    dense, model = blueprint_network()
    inputs, fresh = torch.randn(60, 3, 8, 8), torch.randn(20, 3, 8, 8)
    results = refit_last_factors(model, {"0": "0.1"}, dense, [(inputs, None)])
    assert results["0"].before > 0.05 and results["0"].after < 1e-6
    assert torch.allclose(output_of(model, fresh), output_of(dense, fresh), atol=1e-3)


@given(groups=st.integers(1, 4), n_inputs=st.integers(1, 3), n_outputs=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_groups_are_solved_as_if_alone(groups: int, n_inputs: int, n_outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rows, wanted, old = (
        torch.randn(groups, *shape, generator=generator, dtype=torch.float64)
        for shape in ((20, n_inputs), (20, n_outputs), (n_outputs, n_inputs))
    )
    rows[-1] = 0.0  # inputs that are dead leave their group its weight
    weight, bias = solve_centred(rows, wanted, old, 1e-5)
    for i in range(groups):
        alone, alone_bias = solve_centred(rows[i : i + 1], wanted[i : i + 1], old[i : i + 1], 1e-5)
        assert torch.allclose(weight[i], alone[0]) and torch.allclose(bias[i], alone_bias[0])
    assert torch.equal(weight[-1], old[-1]) and torch.allclose(bias[-1], wanted[-1].mean(0))


def test_what_would_not_hold_on_other_examples_is_not_taken():
    """Few rows of noise, many weights: a solution fits them and nothing else."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(30, 8)).eval()
    model = replace_modules(copy.deepcopy(dense), {"0": split_linear(dense[0], 8)})
    with torch.no_grad():
        model[0][1].weight.mul_(0.95)
    inputs = torch.randn(44, 30)
    dense[0].register_forward_hook(lambda _module, _inputs, output: output + 3 * torch.randn(output.shape))
    before = model[0][1].weight.clone()
    result = refit_last_factors(model, {"0": "0.1"}, dense, [(inputs[:16], None)])["0"]
    assert result.after == result.before
    assert torch.equal(model[0][1].weight, before)
    assert not torch.isnan(output_of(model, inputs)).any()


def test_a_frozen_last_factor_is_left_alone():
    dense, model = blueprint_network()
    model[0][1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert refit_last_factors(model, {"0": "0.1"}, dense, [(torch.randn(60, 3, 8, 8), None)]) == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_linearly_dependent_inputs_are_solved():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4)).eval()
    model = replace_modules(copy.deepcopy(dense), {"0": split_linear(dense[0], 4)})
    with torch.no_grad():
        model[0][0].weight[1] = model[0][0].weight[0]  # two of the factor's inputs are one
        model[0][0].weight[2] = 0.0
    half = torch.randn(100, 3)
    inputs = torch.cat([half, half], 1)
    result = refit_last_factors(model, {"0": "0.1"}, dense, [(inputs, None)])["0"]
    assert result.after < result.before
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_one_axis_and_one_layer_of_transformers_are_refitted():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), Turned(), Conv1D(5, 6)).eval()
    model = copy.deepcopy(dense)
    first = nn.Conv1d(4, 6, 3, padding=1, bias=False)
    first.weight.data = dense[0].weight.data.clone()
    last = nn.Conv1d(6, 6, 1, groups=2)
    model = replace_modules(model, {"0": nn.Sequential(first, last), "2": split_linear(as_linear(dense[2]), 5)})
    with torch.no_grad():
        model[2][1].weight.add_(torch.randn(5, 5))
    inputs, fresh = torch.randn(60, 4, 12), torch.randn(9, 4, 12)
    results = refit_last_factors(model, {"0": "0.1", "2": "2.1"}, dense, [(inputs, None)])
    assert set(results) == {"0", "2"} and max(result.after for result in results.values()) < 1e-6
    assert torch.allclose(output_of(model, fresh), output_of(dense, fresh), atol=1e-3)


class Turned(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2).contiguous()
