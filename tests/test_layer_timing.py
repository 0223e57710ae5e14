"""Layers timed among neighbours, and plans timed whole, each once."""

from pathlib import Path

import pytest
import torch
from tiny_study import INT8, SVD
from torch import nn

from ranksearch.cache import Cache
from ranksearch.compression import rebuild
from ranksearch.finding import compressible_layers
from ranksearch.layer_timing import FEW_CHANNELS, LayerTimer, Neighbourhood, PlanTimer, neighbourhood_example
from ranksearch.plan import DENSE, Plan
from ranksearch.workbench import Workbench


def test_a_layer_is_timed_at_the_targets_batch_once(bench: Workbench, tmp_path: Path) -> None:
    info = bench.found.layers["3"]
    assert info.input_shape[0] == bench.spec.target.batch_size
    timer = LayerTimer(runtime=bench.runtime, target=bench.spec.target, cache=Cache(directory=tmp_path))
    layer = bench.model.get_submodule("3")
    first = timer(info, layer, [INT8])
    assert list(first) == [INT8] and all(figure > 0 for figure in first[INT8])
    assert timer(info, layer, [INT8]) == first and len(list(tmp_path.iterdir())) == 1
    both = timer(info, layer, [INT8, DENSE])
    assert both[INT8] == first[INT8] and len(list(tmp_path.iterdir())) == 2


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolution": (nn.Conv2d(16, 8, 3, stride=2, padding=1), (2, 16, 8, 8)),
    "depthwise": (nn.Conv2d(16, 16, 3, groups=16), (2, 16, 8, 8)),
    "first": (nn.Conv2d(3, 8, 3), (2, 3, 8, 8)),
    "over one axis": (nn.Conv1d(16, 8, 3), (2, 16, 20)),
    "linear": (nn.Linear(16, 8), (2, 16)),
    "linear over positions": (nn.Linear(16, 8), (2, 5, 16)),
    "linear of few": (nn.Linear(3, 8), (2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_among_its_neighbours_a_layer_sees_the_input_that_it_has_in_the_model(name: str) -> None:
    layer, shape = LAYERS[name]
    info = compressible_layers(nn.Sequential(layer), torch.randn(shape)).layers["0"]
    whole, example = Neighbourhood(info, layer).eval(), neighbourhood_example(info)
    seen: list[tuple[int, ...]] = []
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(tuple(inputs[0].shape)))
    try:
        outputs = whole(example)
    finally:
        handle.remove()
    assert seen == [shape] and torch.isfinite(outputs).all()
    # What the user gives is plain and small: the tensor that the layer reads is made by another.
    assert FEW_CHANNELS in example.shape or example.shape == shape


def test_an_8_bit_layers_input_comes_in_8_bits(bench: Workbench) -> None:
    """The layer that makes it writes it so: no kernel converts it in between."""
    info = bench.found.layers["3"]
    whole = Neighbourhood(info, bench.model.get_submodule("3")).eval()
    plan = Plan(layers={"layer": INT8})
    model = rebuild(whole, plan, bench.weight_limit).eval()
    kernels = bench.runtime.prepare(model, neighbourhood_example(info), bench.spec.target).kernels()
    assert not [kernel for kernel in kernels.values() if "Quantize" in kernel or "Convert" in kernel], kernels


def test_a_whole_plan_is_timed_once(bench: Workbench, tmp_path: Path) -> None:
    timer = PlanTimer(
        model=bench.model,
        example=bench.example,
        dense=bench.dense.session,
        shared=bench.shared,
        runtime=bench.runtime,
        target=bench.spec.target,
        cache=Cache(directory=tmp_path),
    )
    plan = Plan(layers={"8": SVD})
    assert timer(plan) == timer(plan) > 0 and len(list(tmp_path.iterdir())) == 1
    timer(Plan(layers={"8": SVD.model_copy(update={"ranks": (2,)})}))
    assert len(list(tmp_path.iterdir())) == 2
