"""Quantizers on tensors: where several read one, where it is rounded, and what runtimes make of it."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ranksearch.compression import compress, rebuild
from ranksearch.errors import PlanError
from ranksearch.export import load, save
from ranksearch.plan import LayerChoice, Plan, Quantizer
from ranksearch.quantization import SharedTensors, activation_quantizers, rounded_outputs, shared_tensors
from ranksearch.quantization.placement import Sum
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target

INT8 = LayerChoice(weight_bits=8, activation_bits=8)
TUCKER_INT8 = LayerChoice(decomposition="tucker2", ranks=(8, 8), weight_bits=8, activation_bits=8)


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU module, in place, used twice."""

    def __init__(self, n_inputs: int, n_outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_inputs, n_outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_outputs, n_outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_outputs)
        self.downsample: nn.Module = nn.Sequential()  # as the shortcut, it lets its input pass
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(n_inputs, n_outputs, 1, stride), nn.BatchNorm2d(n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class Residual(nn.Module):
    """A stem with max pooling, three blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pool(self.stem(x))).mean((2, 3)))


LAYERS = ("stem.0", *(f"blocks.{i}.conv{k}" for i in range(3) for k in (1, 2)), "blocks.1.downsample.0", "head")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def example() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _compressed(model: nn.Module, example: Tensor, choices: dict[str, LayerChoice]) -> nn.Module:
    batches = [(example, torch.zeros(len(example), dtype=torch.long))]
    return compress(model, Plan(layers=choices), calibration=batches, weight_limit=64).eval()


def test_shared_tensors_of_a_residual_network(model: nn.Module, example: Tensor) -> None:
    shared = shared_tensors(model, example[:1])
    assert shared.inputs == {
        "blocks.0.conv1": "stem",  # before the pooling, which then pools integers
        "blocks.1.conv1": "blocks.0",
        "blocks.1.downsample.0": "blocks.0",
        "blocks.2.conv1": "blocks.1",
    }
    assert shared.sums == {
        "blocks.0": Sum(results={"blocks.0.conv2": "blocks.0.bn2"}, tensors=("stem",)),
        "blocks.1": Sum(
            results={"blocks.1.conv2": "blocks.1.bn2", "blocks.1.downsample.0": "blocks.1.downsample"}, tensors=()
        ),
    }


def test_an_activation_in_place_gives_its_tensor_and_what_lets_it_pass_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(), Block(8, 8, 1)).eval()
    assert shared_tensors(model, torch.randn(1, 3, 8, 8)).inputs == {"3.conv1": "1"}


class Odd(nn.Module):
    """Tensors that several read and that nevertheless cannot be rounded where they are produced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)
        self.functional, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        returned = self.first(x)  # the model gives it
        repeated = self.twice(returned) + returned
        repeated = self.twice(repeated) + repeated  # its reader runs twice
        nameless = functional.relu(repeated)  # no module gives it
        return returned, self.last(self.functional(nameless) + nameless)


def test_tensors_that_no_one_module_gives_once_are_not_shared() -> None:
    assert shared_tensors(Odd(), torch.randn(2, 4)) == SharedTensors()


def test_a_shared_tensor_stays_float_for_a_layer_in_float(model: nn.Module, example: Tensor) -> None:
    shared = shared_tensors(model, example[:1])
    places = rounded_outputs(shared, [name for name in LAYERS if name != "blocks.1.downsample.0"])
    assert "blocks.0" not in places.inputs.values()
    assert places.inputs == {"blocks.0.conv1": "stem", "blocks.2.conv1": "blocks.1"}
    # One addend of blocks.1 comes from the float layer, and the sum blocks.0 is not rounded.
    assert places.results == {}


@pytest.mark.parametrize("choice", [INT8, TUCKER_INT8], ids=["dense", "tucker2"])
def test_all_readers_see_one_rounded_tensor(model: nn.Module, example: Tensor, choice: LayerChoice) -> None:
    choices = {name: choice if ".conv" in name else INT8 for name in LAYERS}
    compressed = _compressed(model, example, choices)
    seen: dict[str, Tensor] = {}
    for name in ("blocks.0", "blocks.1.bn2", "blocks.1.downsample"):
        compressed.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.__setitem__(name, output.clone())
        )
    with torch.no_grad():
        compressed(example)
    for name, output in seen.items():
        assert len(output.unique()) <= 256 < output.numel(), name


def test_a_copy_rounds_by_its_own_quantizers(model: nn.Module, example: Tensor) -> None:
    compressed = _compressed(model, example, dict.fromkeys(LAYERS, INT8))
    copied = copy.deepcopy(compressed)
    with torch.no_grad():
        before = compressed(example)
        torch.testing.assert_close(copied(example), before, rtol=0, atol=0)
        for quantizer in activation_quantizers(copied).values():
            quantizer.set_range(0.0, 1e-3)
        assert not torch.allclose(copied(example), before)
        torch.testing.assert_close(compressed(example), before, rtol=0, atol=0)


def test_saved_and_loaded_it_computes_the_same(model: nn.Module, example: Tensor, tmp_path: Path) -> None:
    compressed = _compressed(model, example, {**dict.fromkeys(LAYERS, INT8), "blocks.2.conv2": TUCKER_INT8})
    plan = save(compressed, Plan(layers={**dict.fromkeys(LAYERS, INT8), "blocks.2.conv2": TUCKER_INT8}), tmp_path)
    places = {quantizer.where: (quantizer.output_of, quantizer.readers) for quantizer in plan.quantizers}
    assert places["blocks.1.conv1.activation"] == ("blocks.0", ("blocks.1.downsample.0",))
    assert places["blocks.0.conv2.result"] == ("blocks.0.bn2", ())
    assert places["head.activation"] == (None, ())
    loaded = load(tmp_path, Residual())
    with torch.no_grad():
        torch.testing.assert_close(loaded(example), compressed(example), rtol=0, atol=0)


def test_gradients_pass_the_rounding(model: nn.Module, example: Tensor) -> None:
    compressed = _compressed(model, example, dict.fromkeys(LAYERS, INT8)).train()
    compressed(example).square().mean().backward()
    gradients = [parameter.grad for parameter in compressed.parameters()]
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_a_quantizer_that_the_model_does_not_have_is_refused(model: nn.Module) -> None:
    stray = Quantizer(where="blocks.9.conv1.activation", output_of="stem", low=0.0, high=1.0)
    with pytest.raises(PlanError, match=r"blocks\.9\.conv1"):
        rebuild(model, Plan(layers=dict.fromkeys(LAYERS, INT8), quantizers=(stray,)))


def test_openvino_adds_and_pools_integers_as_with_nncf(model: nn.Module, example: Tensor) -> None:
    pytest.importorskip("nncf")
    runtime, target = get_runtime("openvino"), Target(batch_size=4, threads=1)
    compressed = _compressed(model, example, dict.fromkeys(LAYERS, INT8))
    ours = runtime.prepare(compressed, example, target)
    theirs = runtime.quantize_own(model, [example], example, target)
    # One more than NNCF: we round the mean before the head, NNCF what the mean is of.
    assert _float_additions(ours.kernels()) <= _float_additions(theirs.kernels()) + 1
    at_inputs = runtime.prepare(rebuild(model, Plan(layers=dict.fromkeys(LAYERS, INT8))), example, target)
    assert _float_additions(at_inputs.kernels()) > _float_additions(ours.kernels())
    assert any(kernel.startswith("Pooling") and kernel.endswith("I8") for kernel in ours.kernels().values())
    with torch.no_grad():
        expected = compressed(example).numpy()
    assert np.abs(ours.run(example.numpy()) - expected).max() < 0.05 * np.abs(expected).max()


def _float_additions(kernels: dict[str, str]) -> int:
    """How many fused element-wise nodes ran in float beside the convolutions."""
    counts = Counter(kernel.split()[0] for kernel in kernels.values() if kernel.endswith("f32"))
    return counts["Subgraph"] + counts["Eltwise"] + counts["FakeQuantize"]


WITHOUT_COMPILER = """
import sys
import torch
from torch import nn
from ranksearch.quantization import shared_tensors

shared_tensors(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4))
assert "torch._dynamo" not in sys.modules
"""


def test_tracing_leaves_the_compiler_unimported() -> None:
    """Every process that opens a study traces, and few compile."""
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True)
