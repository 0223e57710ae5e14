"""The statistics against brute force: autograd per example, and torch's own im2col."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import Conv1D, as_image, as_linear
from torch import Tensor, nn

from ranksearch.cache import cache_directory
from ranksearch.errors import StudyError
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.layers import layer_spec
from ranksearch.scoring import output_distance
from ranksearch.statistics import (
    LayerStatistics,
    check_complete,
    check_statistics,
    collect,
    mean_change,
    predicted_loss,
)
from ranksearch.statistics import collector as collecting
from ranksearch.statistics.calibration import _class_loss
from ranksearch.statistics.patches import input_patches, output_rows, sampled_patches, tap_patches


def a_convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 5),
    ).eval()


def batches_of(inputs: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(rows, torch.zeros(len(rows), dtype=torch.int64)) for rows in inputs.split(size)]


def layers_of(model: nn.Module, example: Any) -> dict[str, LayerInfo]:
    return dict(compressible_layers(model, example).layers)


def gradients_by_autograd(model: nn.Module, name: str, inputs: Tensor, size: int, seed: int) -> Tensor:
    """dL_n/dW one example at a time, at the labels that `collect` draws batch by batch."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_submodule(name).get_parameter("weight")
    gradients = []
    for rows in inputs.split(size):
        state = generator.get_state()
        for i in range(len(rows)):
            generator.set_state(state)
            logits = model(rows)
            only = logits.detach().clone()
            only[i] = logits[i]
            gradients.append(torch.autograd.grad(_class_loss(only, generator), weight)[0].flatten(1))
    return torch.stack(gradients)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_patches_times_weight_are_the_convolution(channels, kernel, stride, padding, dilation, mode, seed):
    torch.manual_seed(seed)
    stride = (1, 1) if padding == "same" else stride
    layer = nn.Conv2d(
        channels, 3, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=False
    )
    inputs = torch.randn(2, channels, 7, 8)
    spec = layer_spec(layer)
    patches = input_patches(spec, inputs)
    assert torch.allclose(patches @ layer.weight.flatten(1).T, output_rows(spec, layer(inputs)), atol=1e-5)
    if isinstance(padding, tuple) and mode == "zeros":
        unfolded = F.unfold(inputs, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
        assert torch.equal(patches, unfolded)


@given(
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), size=st.sampled_from([3, 4, 10])
)
@settings(max_examples=20, deadline=None)
def test_input_moments_are_those_of_all_patches(stride, padding, dilation, size):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=stride, padding=padding, dilation=dilation))
    inputs = torch.randn(10, 3, 8, 9) + 0.5
    statistics = collect(model, layers_of(model, inputs[:1]), batches_of(inputs, size), None)["0"]
    patches = F.unfold(inputs, 3, dilation=dilation, padding=padding, stride=stride).transpose(1, 2).double()
    rows = patches.reshape(-1, patches.shape[-1])
    centred = rows - rows.mean(0)
    assert torch.allclose(statistics.input_mean, rows.mean(0), atol=1e-6)
    assert torch.allclose(statistics.input_covariance, centred.T @ centred / 10, atol=1e-4)
    assert statistics.output_gradient_covariance is None


@pytest.mark.parametrize("name", ["0", "3", "5", "7"])
def test_exact_form_is_brute_force_per_example(name):
    model, inputs = a_convnet(), torch.randn(11, 2, 8, 8)
    statistics = collect(model, layers_of(model, inputs[:1]), batches_of(inputs, 4), F.cross_entropy, seed=3)[name]
    expected = gradients_by_autograd(model, name, inputs, 4, seed=3)
    assert torch.allclose(statistics.weight_gradients, expected, atol=1e-5)
    difference = torch.randn_like(model.get_submodule(name).weight)
    changes = (expected * difference.flatten(1)).sum((1, 2))
    assert predicted_loss(statistics, difference) == pytest.approx(float(changes.square().mean()) / 2, rel=1e-4)


def test_absorbed_mean_is_the_exact_form_with_a_corrected_bias():
    model, inputs = a_convnet(), torch.randn(11, 2, 8, 8) + 1
    statistics = collect(model, layers_of(model, inputs[:1]), batches_of(inputs, 11), F.cross_entropy)["7"]
    difference = torch.randn(5, 24)
    bias = difference.double() @ statistics.input_mean
    changes = (statistics.weight_gradients * difference).sum((1, 2)) - statistics.bias_gradients @ bias.float()
    absorbed = predicted_loss(statistics, difference, mean_absorbed=True)
    assert absorbed == pytest.approx(float(changes.square().mean()) / 2, rel=1e-4)
    constant = bias[:, None].float().expand(5, 24)  # of a constant input nothing would be left
    assert absorbed != predicted_loss(statistics, constant)


def test_product_form_agrees_where_inputs_and_gradients_are_independent():
    torch.manual_seed(0)
    n, outer, inner = 20000, torch.randn(3, 3), torch.randn(4, 4)
    gradients, inputs = torch.randn(n, 3) @ outer, torch.randn(n, 4) @ inner
    statistics = LayerStatistics(
        input_covariance=(inputs.T @ inputs / n).double(),
        input_mean=torch.zeros(4, dtype=torch.float64),
        output_gradient_covariance=(gradients.T @ gradients / n).double(),
        weight_gradients=torch.einsum("nt,nd->ntd", gradients, inputs),
        bias_gradients=gradients,
    )
    difference = torch.randn(3, 4)
    product = dataclasses.replace(statistics, weight_gradients=None)
    assert predicted_loss(product, difference) == pytest.approx(predicted_loss(statistics, difference), rel=0.1)


def test_weighted_labels_have_the_second_moment_of_the_softmax():
    logits = torch.tensor([[3.0, 0.0, -1.0, 0.5]]).repeat(200_000, 1).requires_grad_()
    (gradients,) = torch.autograd.grad(_class_loss(logits, torch.Generator().manual_seed(0)), logits)
    p = logits[0].detach().softmax(0)
    assert torch.allclose(gradients.T @ gradients / len(logits), p.diag() - torch.outer(p, p), atol=2e-3)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss], ids=["classes", "values"])
def test_predicts_the_measured_distance_of_a_small_change(loss):
    model, inputs = a_convnet(), torch.randn(2000, 2, 8, 8)
    layers = layers_of(model, inputs[:1])
    statistics = collect(model, layers, batches_of(inputs, 500), loss, max_examples=2000, max_gradient_examples=2000)
    for name in ("0", "3", "7"):
        weight = model.get_submodule(name).weight
        difference = 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            dense = model(inputs)
            weight += difference
            measured = output_distance(model(inputs), dense, loss)
            weight -= difference
        assert predicted_loss(statistics[name], difference) == pytest.approx(measured, rel=0.25)


def test_dictionaries_several_calls_and_tokens():
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.shared, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            towers = [self.shared(self.embed(ids)).relu().mean(1) for ids in (first, second)]
            return self.head(towers[0] * towers[1])

    torch.manual_seed(0)
    model = TwoTowers().eval()
    inputs = {"first": torch.randint(0, 9, (7, 5)), "second": torch.randint(0, 9, (7, 5))}
    statistics = collect(model, layers_of(model, inputs), [(inputs, None)], F.cross_entropy)["shared"]
    rows = torch.cat([model.embed(inputs["first"]), model.embed(inputs["second"])]).reshape(-1, 4).detach().double()
    centred = rows - rows.mean(0)
    assert torch.allclose(statistics.input_covariance, centred.T @ centred / 7, atol=1e-5)
    total = _class_loss(model(**inputs), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(total, model.shared.weight)
    assert torch.allclose(statistics.weight_gradients.sum(0), gradient, atol=1e-5)


def test_batches_are_cut_and_the_memory_is_kept():
    model, inputs = a_convnet(), torch.randn(60, 2, 8, 8)
    layers = layers_of(model, inputs[:1])
    options = {"max_examples": 50, "max_gradient_examples": 40}
    whole = collect(model, layers, batches_of(inputs, 7), F.cross_entropy, **options)
    alone = collect(model, layers, batches_of(inputs[:50], 50), None, **options)
    assert torch.allclose(whole["3"].input_covariance, alone["3"].input_covariance, atol=1e-4)
    assert {len(s.weight_gradients) for s in whole.values()} == {40}
    small = collect(model, layers, batches_of(inputs, 7), F.cross_entropy, memory_bytes=40 * 4 * 280, **options)
    sizes = {name: 0 if s.weight_gradients is None else len(s.weight_gradients) for name, s in small.items()}
    assert sizes["5"] == 0 and set(sizes.values()) > {0}  # the largest layer is left out
    assert small["5"].output_gradient_covariance is not None
    assert all(s.weight_gradients is None for s in alone.values())


def alike(found: LayerStatistics, expected: LayerStatistics) -> None:
    for field in dataclasses.fields(LayerStatistics):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5), field.name


class Groups(nn.Module):
    """A grouped convolution, and its groups as convolutions of their own."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, kind: type[nn.Conv1d] | type[nn.Conv2d]) -> None:
        super().__init__()
        self.layer, n_in, n_out = layer, layer.in_channels // layer.groups, layer.out_channels // layer.groups
        self.alone = nn.ModuleList(
            kind(
                n_in,
                n_out,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                padding_mode=layer.padding_mode,
            )
            for _ in range(layer.groups)
        )
        with torch.no_grad():
            for each, weight, bias in zip(
                self.alone, layer.weight.chunk(layer.groups), layer.bias.chunk(layer.groups), strict=True
            ):
                each.weight.copy_(weight)
                each.bias.copy_(bias)
        self.together = False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.together:
            outputs = self.layer(inputs)
        else:
            parts = inputs.chunk(len(self.alone), dim=1)
            outputs = torch.cat([each(part) for each, part in zip(self.alone, parts, strict=True)], 1)
        return outputs.flatten(2).tanh().mean(-1)


@given(
    groups=st.integers(2, 4),
    width=st.integers(1, 3),
    n_outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    n_axes=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular"]),
)
@settings(max_examples=40, deadline=None)
def test_a_grouped_convolution_has_the_statistics_of_its_groups(groups, width, n_outputs, kernel, stride, n_axes, mode):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d)[n_axes - 1]
    layer = kind(groups * width, groups * n_outputs, kernel, stride=stride, padding=1, groups=groups, padding_mode=mode)
    model, inputs = Groups(layer, kind).eval(), torch.randn(9, groups * width, *[6] * n_axes) + 0.3
    found = []
    for model.together in (True, False):
        layers = layers_of(model, inputs[:1])
        found.append(collect(model, layers, batches_of(inputs, 4), F.cross_entropy, max_examples=9))
    whole = found[0]["layer"]
    alike(dataclasses.replace(whole, output_gradient_covariance=None), stacked(list(found[1].values())))
    assert whole.input_covariance.shape == (groups, width * kernel**n_axes, width * kernel**n_axes)
    difference = torch.randn_like(layer.weight)
    product = dataclasses.replace(whole, weight_gradients=None)
    pieces = zip(range(groups), difference.chunk(groups), strict=True)
    assert predicted_loss(product, difference) == pytest.approx(
        sum(predicted_loss(one_group(whole, i, n_outputs), piece) for i, piece in pieces), rel=1e-9
    )


def stacked(parts: list[LayerStatistics]) -> LayerStatistics:
    """The statistics of groups as those of one grouped layer."""
    return LayerStatistics(
        input_covariance=torch.stack([part.input_covariance for part in parts]),
        input_mean=torch.stack([part.input_mean for part in parts]),
        weight_gradients=torch.cat([part.weight_gradients for part in parts], 1),
        bias_gradients=torch.cat([part.bias_gradients for part in parts], 1),
    )


def one_group(whole: LayerStatistics, group: int, n_outputs: int) -> LayerStatistics:
    mine = slice(group * n_outputs, (group + 1) * n_outputs)
    return LayerStatistics(
        input_covariance=whole.input_covariance[group],
        output_gradient_covariance=whole.output_gradient_covariance[mine, mine],
    )


def test_the_exact_form_absorbs_the_mean_of_every_group():
    model, inputs = a_convnet(), torch.randn(11, 2, 8, 8) + 1
    statistics = collect(model, layers_of(model, inputs[:1]), batches_of(inputs, 11), F.cross_entropy)["5"]
    difference = torch.randn(6, 3, 3, 3)
    seen = input_patches(layer_spec(model[5]), model[:5](inputs).detach()).mean((0, 1)).reshape(2, 27)
    bias = torch.cat([difference[:3].flatten(1) @ seen[0], difference[3:].flatten(1) @ seen[1]])
    torch.testing.assert_close(mean_change(difference, statistics.input_mean), bias.double(), rtol=1e-4, atol=1e-5)
    changes = (statistics.weight_gradients * difference.flatten(1)).sum((1, 2)) - statistics.bias_gradients @ bias
    absorbed = predicted_loss(statistics, difference, mean_absorbed=True)
    assert absorbed == pytest.approx(float(changes.square().mean()) / 2, rel=1e-3)


def test_a_sample_of_positions_stands_for_all(monkeypatch):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8)), torch.randn(40, 8, 24, 24) + 0.5
    layers = layers_of(model, inputs[:1])
    whole = collect(model, layers, batches_of(inputs, 16), None, max_examples=40)["0"]
    monkeypatch.setattr(collecting, "COVARIANCE_COPIES", 72 * 40 * 100)  # 100 positions of 576
    sample = collect(model, layers, batches_of(inputs, 16), None, max_examples=40)["0"]
    assert not torch.equal(sample.input_covariance, whole.input_covariance)
    scale = whole.input_covariance.diagonal(dim1=1, dim2=2).mean()
    assert float((sample.input_covariance - whole.input_covariance).abs().max()) < 0.1 * scale
    assert torch.allclose(sample.input_mean, whole.input_mean, atol=0.05)


@given(
    n_axes=st.sampled_from([0, 1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    picked=st.lists(st.integers(0, 3 * 4 - 1), max_size=9),
)
@settings(max_examples=30, deadline=None)
def test_sampled_patches_are_rows_of_all_patches(n_axes, kernel, stride, picked):
    torch.manual_seed(0)
    layer = (nn.Linear(4, 2), nn.Conv1d(4, 2, kernel, stride=stride), nn.Conv2d(4, 2, kernel, stride=stride))[n_axes]
    inputs = torch.randn(3, 9, 4) if n_axes == 0 else torch.randn(3, 4, *[9] * n_axes)
    spec, index = layer_spec(layer), torch.tensor(picked, dtype=torch.int64)
    rows = tap_patches(spec, inputs).flatten(0, 1)
    assert torch.equal(sampled_patches(spec, inputs, index), rows[index])


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2) | st.sampled_from(["same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 3]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_conv1d_has_the_statistics_of_the_conv2d_of_height_one(kernel, stride, padding, dilation, groups, mode):
    torch.manual_seed(0)
    layer = nn.Conv1d(
        3, 6, kernel, stride=1 if padding == "same" else stride, padding=padding, dilation=dilation, groups=groups,
        padding_mode=mode,
    )  # fmt: skip
    inputs = torch.randn(7, 3, 10) + 0.4
    patches = input_patches(layer_spec(layer), inputs)
    rows = patches.reshape(7, -1, groups, 3 // groups * kernel)
    outputs = torch.einsum("npgd,gtd->npgt", rows, layer.weight.reshape(groups, -1, 3 // groups * kernel)).flatten(2)
    assert torch.allclose(outputs + layer.bias, output_rows(layer_spec(layer), layer(inputs)), atol=1e-5)
    statistics = [
        collect(model, layers_of(model, seen[:1]), batches_of(seen, 4), F.cross_entropy)["0"]
        for model, seen in (
            (nn.Sequential(layer, nn.Tanh(), nn.Flatten()), inputs),
            (nn.Sequential(as_image(layer), nn.Tanh(), nn.Flatten()), inputs.unsqueeze(2)),
        )
    ]
    alike(*statistics)


def test_the_conv1d_of_transformers_has_the_statistics_of_the_linear():
    torch.manual_seed(0)
    layer, inputs = Conv1D(5, 4), torch.randn(9, 3, 4)
    models = [nn.Sequential(each, nn.Tanh(), nn.Flatten()) for each in (layer, as_linear(layer))]
    alike(*(collect(m, layers_of(m, inputs[:1]), batches_of(inputs, 4), F.cross_entropy)["0"] for m in models))


def test_layers_called_by_keyword_are_seen():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(input=inputs)

    torch.manual_seed(0)
    model, inputs = Named(), torch.randn(9, 4)
    plain = nn.Sequential(model.head)
    alike(
        collect(model, layers_of(model, inputs), batches_of(inputs, 4), F.cross_entropy)["head"],
        collect(plain, layers_of(plain, inputs), batches_of(inputs, 4), F.cross_entropy)["0"],
    )


def test_nothing_is_predicted_without_gradients():
    with pytest.raises(StudyError, match="collect the statistics with a loss"):
        predicted_loss(LayerStatistics(), torch.zeros(2, 2))


def a_grouped_network(n_outputs: int = 5, groups: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(144, n_outputs))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(*a_grouped_network(), nn.Linear(5, 5)), "tell of layer '4', and Sequential has '0', '3'"),
        (a_grouped_network(groups=1), r"'0'.* input_covariance is \(18, 18\); its .* \(4, 1, 3, 3\) needs \(2, 9, 9\)"),
        (a_grouped_network(n_outputs=7), r"layer '3'.* output_gradient_covariance is \(7, 7\); .* needs \(5, 5\)"),
    ],
    ids=["name", "groups", "outputs"],
)
def test_statistics_of_another_model_are_told_by_layer(other, message):
    mine, inputs = a_grouped_network(), torch.randn(4, 2, 8, 8)
    own, foreign = (
        collect(model, layers_of(model, inputs), batches_of(inputs, 4), F.cross_entropy) for model in (mine, other)
    )
    check_statistics(mine, own)
    check_complete(own, ["0", "3"])
    with pytest.raises(StudyError, match=message):
        check_statistics(mine, foreign)


def test_layers_of_which_statistics_tell_nothing_are_named():
    with pytest.raises(StudyError, match="nothing of layer '3', but of '0', '5'; collect them"):
        check_complete({"0": LayerStatistics(), "5": LayerStatistics()}, ["0", "3"])


def test_the_model_stays_as_it_was():
    model, inputs = a_convnet().train(), torch.randn(8, 2, 8, 8)
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(model, layers_of(model, inputs), batches_of(inputs, 4), F.cross_entropy)
    assert model.training and not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_say_what_is_wrong():
    model, inputs = a_convnet(), torch.randn(4, 2, 8, 8)
    layers = layers_of(model, inputs)
    with pytest.raises(StudyError, match="yields no example"):
        collect(model, layers, [], F.cross_entropy)
    inputs[0, 0, 0, 0] = float("nan")
    with pytest.raises(StudyError, match="layer '0'.*not all finite"):
        collect(model, layers, batches_of(inputs, 4), None)


class EarlyAndLate(nn.Module):
    """Two outputs, of which the first does not depend on the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.second(F.relu(self.first(x)))
        return early, self.third(F.relu(early))


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), F.cross_entropy),
        (EarlyAndLate(), lambda outputs, targets: outputs[1].sum()),
    ],
)
def test_layers_that_do_not_fit_the_memory_together_take_a_pass_each(model: nn.Module, loss: Any) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)]
    layers = compressible_layers(model.eval(), batches[0][0]).layers
    at_once = collect(model, layers, batches, loss)
    in_turn = collect(model, layers, batches, loss, moment_bytes=8 * (8**2 + 6**2))
    assert list(in_turn) == list(at_once)
    for name, known in at_once.items():
        for field in dataclasses.fields(known):
            one, other = getattr(known, field.name), getattr(in_turn[name], field.name)
            assert one is not None, (name, field.name)
            assert torch.equal(one, other), (name, field.name)
    assert not list(cache_directory().glob("statistics-*")), "the file goes with the last tensor"
