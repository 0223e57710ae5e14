"""Compressed models in files for other programs give torch's outputs, at any batch, under their own names."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.errors import MeasurementError
from ranksearch.plan import LayerChoice, Plan
from ranksearch.portable import FORMATS, write_portable
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target

INT8 = {"weight_bits": 8, "activation_bits": 8}


class Pair(nn.Module):
    """Two named inputs, two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(tokens)) * mask
        return {"logits": self.second(hidden), "hidden": hidden}


def convolutional() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)).eval()
    inputs = torch.randn(4, 3, 8, 8)
    plan = Plan(
        layers={
            "0": LayerChoice(**INT8),
            "3": LayerChoice(decomposition="tucker2", ranks=(8, 8), **INT8),
            "7": LayerChoice(decomposition="svd", ranks=(6,)),
        }
    )
    # As a study has it: what the sums of this processor's kernels hold.
    limit = get_runtime("openvino").weight_limit(Target())
    return rs.compress(model, plan, calibration=[(inputs, None)], weight_limit=limit).eval(), inputs


def mapped() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs = {"tokens": torch.randn(6, 12), "mask": torch.rand(6, 32)}
    plan = Plan(layers={"first": LayerChoice(decomposition="svd", ranks=(4,), weight_bits=4)})
    return rs.compress(Pair().eval(), plan, calibration=[(inputs, None)]).eval(), inputs


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("make", [convolutional, mapped])
def test_any_batch_gives_torchs_outputs(name: str, make: Any, tmp_path: Path) -> None:
    model, inputs = make()
    (path,) = write_portable(model, inputs, tmp_path, [name])
    assert path.parent == tmp_path and path.stem == "portable"
    more = (
        {key: torch.cat([value] * 3) for key, value in inputs.items()}
        if isinstance(inputs, dict)
        else torch.cat([inputs] * 3)
    )
    leaves = list(more.values()) if isinstance(more, dict) else [more]
    given = FORMATS[name].open(path)([leaf.numpy() for leaf in leaves])
    with torch.no_grad():
        wanted = model(**more) if isinstance(more, dict) else model(more)
    for own, other in zip(given, wanted.values() if isinstance(wanted, dict) else [wanted], strict=True):
        scale = float(other.square().mean().sqrt())
        assert float(np.sqrt(np.mean((own - other.numpy()) ** 2))) < 0.05 * scale


def test_inputs_and_outputs_bear_names(tmp_path: Path) -> None:
    model, inputs = mapped()
    write_portable(model, inputs, tmp_path, ["onnx", "openvino"])
    session = onnxruntime.InferenceSession(str(tmp_path / "portable.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["tokens", "mask"]
    assert [value.name for value in session.get_outputs()] == ["logits", "hidden"]
    found = openvino.Core().read_model(tmp_path / "portable.xml")
    assert [port.any_name for port in found.inputs] == ["tokens", "mask"]
    assert [port.any_name for port in found.outputs] == ["logits", "hidden"]
    assert [port.partial_shape[0].is_dynamic for port in (*found.inputs, *found.outputs)] == [True] * 4


def test_a_static_file_has_the_examples_batch(tmp_path: Path) -> None:
    model, inputs = convolutional()
    write_portable(model, inputs, tmp_path, ["onnx", "openvino"], dynamic=False)
    shape = onnx.load(tmp_path / "portable.onnx").graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [4, 3, 8, 8]
    assert list(openvino.Core().read_model(tmp_path / "portable.xml").inputs[0].shape) == [4, 3, 8, 8]


def test_onnx_holds_eight_bits_in_operators_that_every_runtime_has(tmp_path: Path) -> None:
    model, inputs = convolutional()
    (path,) = write_portable(model, inputs, tmp_path, ["onnx"])
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    int8 = [w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert {tuple(weight.dims) for weight in int8} >= {(16, 3, 3, 3), (8, 8, 3, 3)}


class Baked(nn.Module):
    """Its batch is a number in its code, or one that tracing takes for a number."""

    def __init__(self, n_rows: int | None) -> None:
        super().__init__()
        self.layer, self.n_rows = nn.Linear(8, 4), n_rows

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).reshape(self.n_rows or len(inputs.tolist()), 4)


@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
@pytest.mark.parametrize("n_rows", [6, None])
def test_a_batch_that_is_baked_in_is_told(name: str, n_rows: int | None, tmp_path: Path) -> None:
    model, inputs = Baked(n_rows).eval(), torch.randn(6, 8)
    if name == "pt2" and n_rows is None:
        pytest.skip("torch.export traces no lists of a tensor's numbers, whatever the batch")
    with pytest.raises(MeasurementError):
        write_portable(model, inputs, tmp_path, [name])
    (path,) = write_portable(model, inputs, tmp_path, [name], dynamic=False)
    assert path.is_file()
