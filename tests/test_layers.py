"""The layers that can be compressed, with their sizes, and the reasons for the others."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import Conv1D, as_linear
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ranksearch.errors import StudyError
from ranksearch.finding import compressible_layers, unread_layers
from ranksearch.layers import (
    ConvSpec,
    LinearSpec,
    build_layer,
    call_model,
    count_macs,
    evaluating,
    layer_spec,
    layer_weight,
)


class Odd(nn.Module):
    """Layers of every kind: shared, repeated, tied, never run, and called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(8, 8)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.again = self.depthwise
        self.sequence = nn.Conv1d(8, 6, 3, groups=2)
        self.upwards = nn.ConvTranspose1d(6, 8, 1)
        self.unused = nn.Linear(2, 2)
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.depthwise(self.norm(self.stem(x))))
        x = self.upwards(self.sequence(x.flatten(2))).mean(-1)
        return self.tied_too(self.tied(self.late(input=x)))


def test_finds_layers_in_the_order_in_which_they_run() -> None:
    found = compressible_layers(Odd(), torch.randn(2, 3, 8, 8))
    assert list(found.layers) == ["stem", "depthwise", "sequence", "late"]
    assert found.skipped == {
        "upwards": "ConvTranspose1d is not supported",
        "unused": "the example never runs it",
        "tied": "its weight is tied to another module's",
        "tied_too": "its weight is tied to another module's",
    }


def test_sizes_are_those_of_the_run() -> None:
    layers = compressible_layers(Odd(), torch.randn(2, 3, 8, 8)).layers
    stem, depthwise, sequence, late = (layers[name] for name in ("stem", "depthwise", "sequence", "late"))
    assert stem.input_shape == (2, 3, 8, 8)
    assert stem.output_shape == (2, 8, 4, 4)
    assert (stem.macs, stem.n_params, stem.n_calls) == (8 * 16 * 27, 8 * 27, 1)
    assert (depthwise.macs, depthwise.n_params, depthwise.n_calls) == (2 * 8 * 16 * 9, 80, 2)
    assert (sequence.input_shape, sequence.output_shape) == ((2, 8, 16), (2, 6, 14))
    assert (sequence.macs, sequence.n_params, sequence.n_calls) == (6 * 14 * 4 * 3, 6 * 4 * 3 + 6, 1)
    assert (late.macs, late.n_params, late.input_shape) == (64, 72, (2, 8))


def test_counts_rows_of_a_linear_and_all_weights_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    example = torch.randn(2, 5, 6)
    layers = compressible_layers(model, example).layers
    assert [layer.macs for layer in layers.values()] == [5 * 24, 5 * 8]
    assert count_macs(model, example) == 5 * 32


def test_models_take_tensors_tuples_and_mappings() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b)

    model, a, b = TwoInputs(), torch.randn(1, 4), torch.randn(1, 4)
    examples: tuple[Any, ...] = ((a, b), [a, b], {"a": a, "b": b})
    for example in examples:
        assert torch.equal(call_model(model, example), model(a, b))
        assert list(compressible_layers(model, example).layers) == ["fc"]


def test_weights_that_others_compute_or_read_are_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
            self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.spectral(self.normed(self.block(x))))

    found = compressible_layers(Mixed(), torch.randn(2, 3, 8))
    assert list(found.layers) == ["head"]
    assert "reads its weight without calling" in found.skipped["block.linear1"]
    assert "MultiheadAttention" in found.skipped["block.self_attn"]
    assert "computed from other parameters" in found.skipped["normed"]
    assert "computed from other parameters" in found.skipped["spectral"]


def test_the_model_comes_back_as_it_was() -> None:
    model = Odd().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressible_layers(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert model.stem.training
    assert not model.norm.training
    assert not model.stem._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluating_restores_modes_after_an_error() -> None:
    model = Odd().train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not torch.is_grad_enabled()
        model(torch.randn(1, 5))
    assert model.norm.training
    assert torch.is_grad_enabled()


def test_nothing_to_compress_says_what_was_skipped() -> None:
    with pytest.raises(StudyError, match="Sequential has no layer that can be compressed: 0 .Conv3d is not supported"):
        compressible_layers(nn.Sequential(nn.Conv3d(2, 2, 1)), torch.randn(1, 2, 4, 4, 4))
    with pytest.raises(StudyError, match="it has no weights"):
        compressible_layers(nn.ReLU(), torch.randn(1, 2))


def test_subclasses_have_no_spec() -> None:
    class Own(nn.Linear):
        pass

    assert layer_spec(Own(2, 2)) is None
    assert layer_spec(nn.ReLU()) is None


def over_axes(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=40, deadline=None)
@given(
    n_axes=st.sampled_from([1, 2]),
    channels=over_axes(1, 4),
    groups=st.integers(1, 3),
    kernel_size=over_axes(1, 4),
    stride=over_axes(1, 3),
    padding=over_axes(0, 2) | st.just("valid"),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
)
def test_a_convolution_is_rebuilt_from_its_spec(
    n_axes: int, channels: tuple[int, int], groups: int, padding_mode: Any, bias: bool, **by_axis: Any
) -> None:
    cut = {name: value if isinstance(value, str) else value[:n_axes] for name, value in by_axis.items()}
    spec = ConvSpec(
        in_channels=channels[0] * groups,
        out_channels=channels[1] * groups,
        groups=groups,
        dilation=(1, 2)[-n_axes:],
        padding_mode=padding_mode,
        bias=bias,
        **cut,
    )
    layer = build_layer(spec)
    assert type(layer) is (nn.Conv1d, nn.Conv2d)[n_axes - 1]
    assert layer_spec(layer) == spec
    assert tuple(layer.weight.shape) == spec.weight_shape


def test_the_conv1d_of_transformers_is_a_linear() -> None:
    layer, example = Conv1D(6, 4), torch.randn(2, 5, 4)
    linear = as_linear(layer)
    spec = layer_spec(layer)
    assert spec == layer_spec(linear) == LinearSpec(in_features=4, out_features=6, bias=True)
    assert type(build_layer(spec)) is nn.Linear
    assert torch.equal(layer_weight(layer), linear.weight)
    found, expected = (compressible_layers(nn.Sequential(each), example).layers["0"] for each in (layer, linear))
    assert found == expected
    assert count_macs(layer, example) == count_macs(linear, example) == 5 * 24
    layer_weight(layer).fill_(2.0)
    assert bool((layer.weight == 2.0).all()), "the layer's weight is written through it"


def test_only_transformers_own_conv1d_is_one() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert layer_spec(Conv1D()) is None
    with pytest.raises(StudyError, match="0 .Conv1D is not supported"):
        compressible_layers(nn.Sequential(Conv1D()), torch.randn(2, 4))


def test_a_linear_is_rebuilt_from_its_spec() -> None:
    spec = LinearSpec(in_features=3, out_features=5, bias=False)
    layer = build_layer(spec)
    assert layer_spec(layer) == spec
    assert tuple(layer.weight.shape) == spec.weight_shape


class Pooled(nn.Module):
    """As BERT has it: a pooler that nothing reads, unless it is asked for; and a table that is read by sums alone."""

    def __init__(self, *, reads: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.words, self.layer, self.pooler, self.head = (
            nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2),
        )  # fmt: skip
        self.reads = reads
        self.requires_grad_(not frozen)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        states = torch.relu(self.layer(self.words(ids)))
        pooled = self.pooler(states[:, 0])
        return {"kinds": self.head(states.mean(1) + (pooled if self.reads else 0)), "length": ids.ne(0).sum(1)}


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_nothing_reads_are_told(frozen: bool) -> None:
    example, names = torch.randint(0, 9, (2, 5)), ["words", "layer", "pooler", "head"]
    reason = {"pooler": "nothing that the model gives depends on it, or no gradient reaches it (torch.no_grad, detach)"}
    model = Pooled(frozen=frozen)
    assert unread_layers(model, example, names) == reason
    assert not any(p.requires_grad == frozen for p in model.parameters()) and model.training
    assert unread_layers(Pooled(reads=True, frozen=frozen), example, names) == {}


def test_where_no_gradient_can_tell_all_layers_stay() -> None:
    class Ranks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)  # type: ignore[no-any-return]

    in_place = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).requires_grad_(False)
    for model in (Ranks(nn.Linear(4, 4)), in_place):
        assert unread_layers(model, torch.randn(2, 4), ["0"]) == {}
