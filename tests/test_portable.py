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
    return compressed(model, plan, inputs), inputs


def compressed(model: nn.Module, plan: Plan, inputs: Any) -> nn.Module:
    """As a study has it: weights of what the sums of this processor's kernels hold."""
    limit = get_runtime("openvino").weight_limit(Target())
    return rs.compress(model, plan, calibration=[(inputs, None)], weight_limit=limit).eval()


def mapped() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs = {"tokens": torch.randn(6, 12), "mask": torch.rand(6, 32)}
    plan = Plan(layers={"first": LayerChoice(decomposition="svd", ranks=(4,), weight_bits=4)})
    return rs.compress(Pair().eval(), plan, calibration=[(inputs, None)]).eval(), inputs


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("make", [convolutional, mapped])
def test_any_batch_gives_torchs_outputs(name: str, make: Any, tmp_path: Path) -> None:
    model, inputs = make()
    path = write_portable(model, inputs, tmp_path, [name])[0].path
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
    path = write_portable(model, inputs, tmp_path, ["onnx"])[0].path
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    int8 = [w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert {tuple(weight.dims) for weight in int8} >= {(16, 3, 3, 3), (8, 8, 3, 3)}


@pytest.mark.slow
def test_an_exported_program_computes_the_same_compiled(tmp_path: Path) -> None:
    model, inputs = convolutional()
    (written,) = write_portable(model, inputs, tmp_path, ["pt2"])
    session = get_runtime("torch").open(written.path, Target(runtime="torch", mode="compile", threads=1, batch_size=4))
    with torch.no_grad():
        np.testing.assert_allclose(session.run(inputs.numpy()), model(inputs), rtol=1e-4, atol=1e-5)


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
    (written,) = write_portable(model, inputs, tmp_path, [name], dynamic=False)
    assert written.path.is_file() and written.takes == "the example's batch"


class Gathered(nn.Module):
    """Takes whatever it is given, as a wrapper does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.layer(sum(inputs) + sum(named.values()))


@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
@pytest.mark.parametrize("kind", ["one", "two", "named"])
def test_a_forward_that_gathers_its_inputs_is_written_for_any_batch(name: str, kind: str, tmp_path: Path) -> None:
    one, other = torch.randn(6, 8), torch.randn(6, 8)
    inputs = {"one": one, "two": (one, other), "named": {"first": one, "second": other}}[kind]
    (written,) = write_portable(Gathered().eval(), inputs, tmp_path, [name])
    assert written.takes == "any batch"


class Text(nn.Module):
    """Tokens and their mask to an output for each token and one for each text, of up to 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24, padding_idx=0), nn.Embedding(16, 24)
        self.layer, self.head = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        states = torch.relu(self.layer(self.words(ids) + self.places(places))) * mask[..., None]
        return {"states": states, "kinds": self.head(states.sum(1) / mask.sum(1, keepdim=True))}


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(0, 50, (4, 12)), "mask": torch.ones(4, 12)}
    stored = LayerChoice(weight_bits=4)
    plan = Plan(layers={"words": stored, "places": LayerChoice(weight_bits=8), "layer": LayerChoice(**INT8)})
    return compressed(Text().eval(), plan, inputs), inputs


@pytest.mark.parametrize("name", list(FORMATS))
def test_texts_of_any_length_give_torchs_outputs(name: str, tmp_path: Path) -> None:
    model, inputs = text()
    (written,) = write_portable(model, inputs, tmp_path, [name])
    assert (written.takes, written.note) == ("any batch and length", None)
    run = FORMATS[name].open(written.path)
    for n_rows, length in ((1, 16), (7, 5), (4, 12)):
        given = torch.randint(0, 50, (n_rows, length)), torch.ones(n_rows, length)
        with torch.no_grad():
            wanted = model(*given)
        for own, other in zip(run([leaf.numpy() for leaf in given]), wanted.values(), strict=True):
            torch.testing.assert_close(torch.as_tensor(own), other, rtol=1e-3, atol=1e-3)


def test_files_keep_embeddings_in_few_bits_and_name_the_free_axes(tmp_path: Path) -> None:
    model, inputs = text()
    write_portable(model, inputs, tmp_path, ["onnx", "openvino"])
    graph = onnx.load(tmp_path / "portable.onnx").graph
    axes = {value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim][:2] for value in
            (*graph.input, *graph.output)}  # fmt: skip
    assert axes == {
        "ids": ["batch", "length"], "mask": ["batch", "length"], "states": ["batch", "length"], "kinds": ["batch", ""],
    }  # fmt: skip
    assert (50, 24) not in {tuple(w.dims) for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    constants = [op for op in openvino.Core().read_model(tmp_path / "portable.xml").get_ops()
                 if op.get_type_name() == "Constant"]  # fmt: skip
    kinds = {(op.get_element_type().get_type_name(), tuple(op.shape)) for op in constants}
    assert ("u4", (50, 1, 32)) in kinds and ("i8", (16, 24)) in kinds


class OfOneLength(nn.Module):
    """Takes texts of six tokens alone; with `told` it says so, else tracing bakes their length in."""

    def __init__(self, *, told: bool) -> None:
        super().__init__()
        self.words, self.layer, self.told = nn.Embedding(9, 4), nn.Linear(4, 2), told

    def forward(self, ids: Tensor) -> Tensor:
        if self.told and ids.shape[1] != 6:
            raise ValueError("six tokens")
        mean = self.words(ids).sum(1) / float(ids.shape[1])
        return self.layer(mean)  # type: ignore[no-any-return]


@pytest.mark.parametrize("told", [True, False])
def test_a_length_that_is_not_free_leaves_the_batch_free(told: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = OfOneLength(told=told).eval(), torch.randint(0, 9, (4, 6))
    (written,) = write_portable(model, ids, tmp_path, ["onnx"])
    assert written.takes == "any batch"
    assert written.note is None if told else "length 3" in str(written.note)
    given = torch.randint(0, 9, (7, 6))
    with torch.no_grad():
        wanted = model(given)
    torch.testing.assert_close(torch.as_tensor(FORMATS["onnx"].open(written.path)([given.numpy()])[0]), wanted)
