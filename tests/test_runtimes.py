"""The runtimes: one contract for all, int8 kernels that really run, and opening without torch."""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.layers import layer_spec
from ranksearch.portable import write_portable
from ranksearch.quantization import Int8, observe_ranges, quantize_module
from ranksearch.runtimes import RUNTIMES, base, get_runtime, int8_kernels, register_runtime
from ranksearch.spec import Target
from ranksearch.surgery import replace_modules
from ranksearch.testing import check_runtime

TARGET = Target(threads=1, batch_size=4)
OPENVINO = RUNTIMES["openvino"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _quantized(model: nn.Module, example: torch.Tensor, limit: int = 64) -> nn.Module:
    layers = {name: module for name, module in model.named_modules() if layer_spec(module)}
    model = replace_modules(model, {name: quantize_module(module, Int8(limit)) for name, module in layers.items()})
    observe_ranges(model, [example])
    return model.eval()


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_contract(name: str) -> None:
    check_runtime(get_runtime(name))


CHAIN = [nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1)]
INT8_CASES = {
    "first_layer": ([nn.Conv2d(1, 16, 3, padding=1)], (4, 1, 8, 8)),
    "conv": ([nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()], (4, 16, 8, 8)),
    "depthwise": ([nn.Conv2d(16, 16, 3, groups=16)], (4, 16, 8, 8)),
    "linear": ([nn.Linear(20, 10)], (4, 20)),
    "linear_factors": (
        [nn.Linear(64, 8, bias=False), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8, bias=False), nn.Linear(8, 10)],
        (4, 64),
    ),
    "factor_chain": (CHAIN, (4, 16, 8, 8)),
    "whole": (
        [
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            *CHAIN,
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        ],
        (4, 1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", INT8_CASES)
def test_quantized_layers_run_int8_kernels_and_agree_with_torch(name: str, tmp_path: Path) -> None:
    modules, shape = INT8_CASES[name]
    example = torch.randn(shape)
    model = _quantized(nn.Sequential(*copy.deepcopy(modules)), example)
    n_layers = sum(layer_spec(module) is not None for module in modules)
    with torch.no_grad():
        expected = model(example).numpy()
    prepared = OPENVINO.prepare(model, example, TARGET)
    opened = OPENVINO.open(OPENVINO.serialise(model, example, TARGET, tmp_path), TARGET)
    for session in (prepared, opened):
        assert len(int8_kernels(session.kernels())) == n_layers, session.kernels()
        # One step of rounding apart, where a value lies between two codes.
        assert np.abs(session.run(example.numpy()) - expected).max() < 0.03 * np.abs(expected).max()


def test_placeholders_run_int8_kernels() -> None:
    model = nn.Sequential(*[quantize_module(layer) for layer in CHAIN]).eval()
    session = OPENVINO.prepare(model, torch.randn(4, 16, 8, 8), TARGET)
    assert len(int8_kernels(session.kernels())) == 3


def test_a_channel_of_zeros_keeps_the_int8_kernel() -> None:
    layer = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        layer.weight[2].zero_()
    example = torch.randn(4, 8, 8, 8)
    model = _quantized(nn.Sequential(layer), example)
    assert int8_kernels(OPENVINO.prepare(model, example, TARGET).kernels())


def test_only_quantized_layers_leave_float() -> None:
    example = torch.randn(4, 16, 8, 8)
    head = _quantized(nn.Sequential(nn.Conv2d(16, 16, 3)), example)
    session = OPENVINO.prepare(nn.Sequential(head, nn.ReLU(), nn.Conv2d(16, 8, 3)).eval(), example, TARGET)
    convolutions = [kernel for kernel in session.kernels().values() if kernel.startswith("Convolution")]
    assert len(convolutions) == 2
    assert len(int8_kernels(session.kernels())) == 1


def test_int8_artefact_holds_int8_weights(tmp_path: Path) -> None:
    example = torch.randn(4, 64, 8, 8)
    model = _quantized(nn.Sequential(nn.Conv2d(64, 64, 3)), example)
    OPENVINO.serialise(model, example, TARGET, tmp_path)
    assert (tmp_path / "model.bin").stat().st_size < 1.2 * 64 * 64 * 9


def test_weight_limit_keeps_sums_from_saturating() -> None:
    limit = OPENVINO.weight_limit(TARGET)
    assert limit in (64, 127)
    layer, example = nn.Linear(64, 16), torch.full((4, 64), 1.0)
    with torch.no_grad():
        layer.weight.fill_(1.0)  # every product is the largest there is
    model = _quantized(nn.Sequential(layer), example, limit)
    with torch.no_grad():
        expected = model(example).numpy()
    np.testing.assert_allclose(OPENVINO.prepare(model, example, TARGET).run(example.numpy()), expected, rtol=0.01)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 16, 3), nn.Conv2d(8, 8, (1, 3), stride=2), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(16, 10)]
)
def test_supported_bits_are_those_of_kernels_that_run(layer: nn.Module) -> None:
    spec = layer_spec(layer)
    assert spec is not None
    compressed = ((8, 32),) if isinstance(layer, nn.Linear) else ()
    assert OPENVINO.supported_bits(spec, TARGET) == ((32, 32), (8, 8), *compressed)
    assert RUNTIMES["onnxruntime"].supported_bits(spec, TARGET)[0] == (32, 32)


class _Bessel(nn.Module):
    """Applies a function that neither format has an operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.linear(x))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_operator_that_cannot_be_converted_is_named(name: str) -> None:
    target = Target(runtime=name, batch_size=2, threads=1)
    with pytest.raises(MeasurementError, match="aten::special_bessel_j0"):
        get_runtime(name).prepare(_Bessel().eval(), torch.randn(2, 4), target)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_differences_convert(name: str) -> None:
    """transformers' causal models look by them for packed sequences."""

    class Differences(nn.Module):
        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            packed = torch.diff(values, prepend=values[:, :1] - 1, dim=-1)
            return packed, values.diff(2, 0), (values > 0).diff().int(), (packed != 1).cumsum(-1)

    model, values = Differences(), torch.randint(-3, 4, (4, 6))
    outputs = get_runtime(name).prepare(model, values, Target(runtime=name, batch_size=4)).run(values.numpy())
    for own, expected in zip(outputs, model(values), strict=True):
        assert np.array_equal(own, expected.numpy())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_outputs_that_are_no_tensors_are_left_out(name: str) -> None:
    """As the caches that causal models give beside the logits."""

    class Caching(nn.Module):
        def forward(self, values: torch.Tensor) -> dict[str, object]:
            return {"logits": values + 1, "cache": object()}

    session = get_runtime(name).prepare(Caching().eval(), torch.randn(2, 3), Target(runtime=name, batch_size=2))
    outputs = session.run(np.zeros((2, 3), dtype=np.float32))
    assert list(outputs) == ["logits"] and np.array_equal(outputs["logits"], np.ones((2, 3)))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_pooling_of_any_window_gives_what_torch_gives(name: str) -> None:
    """Adaptive windows that overlap, and one that hangs over, as VGG on small images and EfficientNet have them."""
    hangs_over = nn.AvgPool2d(64, ceil_mode=True)
    small = [nn.Conv2d(3, 4, 3, stride=2), nn.MaxPool2d((2, 16), ceil_mode=True), hangs_over]
    model = nn.Sequential(nn.AdaptiveAvgPool2d((5, 7)), *small).eval()
    images = torch.randn(2, 3, 10, 12)
    session = get_runtime(name).prepare(model, images, Target(runtime=name, batch_size=2))
    assert session.run(images.numpy()) == pytest.approx(model(images).detach().numpy(), abs=1e-6)
    assert hangs_over.kernel_size == 64, "the model stays as it is"


def test_training_after_prepare_leaves_the_session_alone() -> None:
    model, example = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(4, 4)
    session = OPENVINO.prepare(model, example, TARGET)
    before = session.run(example.numpy())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    del model
    gc.collect()
    np.testing.assert_array_equal(session.run(example.numpy()), before)


OPEN_WITHOUT_TORCH = """
import sys
import numpy as np
from pathlib import Path
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target
runtime, target = get_runtime("openvino"), Target(threads=1)
runtime.check(target)
session = runtime.open(Path(sys.argv[1]), target)
inputs = {"wide": np.ones((2, 6), np.float32), "narrow": np.ones((2, 3), np.float32)}
outputs = session.run(inputs)
session.bind(inputs)()
runtime.fingerprint(target), session.kernels(), runtime.weight_limit(target)
assert list(outputs) == ["sum", "rows"], outputs
assert "torch" not in sys.modules
assert "openvino_telemetry" not in sys.modules
print(float(outputs["sum"].sum()))
"""


class Named(nn.Module):
    """Takes named inputs and gives named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, wide: torch.Tensor, narrow: torch.Tensor) -> dict[str, torch.Tensor]:
        joined = self.left(wide) + self.right(narrow)
        return {"sum": joined, "rows": joined.mean(1)}


def test_opening_needs_no_torch_and_sends_no_telemetry(tmp_path: Path) -> None:
    model, example = Named(), {"narrow": torch.ones(2, 3), "wide": torch.ones(2, 6)}
    path = OPENVINO.serialise(model, example, TARGET, tmp_path)
    root = Path(base.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_TORCH, str(path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(model(**example)["sum"].detach().sum()), rel=1e-4)


def test_unknown_runtime_lists_those_there_are() -> None:
    with pytest.raises(RuntimeUnavailableError, match="'tensorflow'; there are onnxruntime, openvino, torch"):
        get_runtime("tensorflow")


def test_missing_package_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match="pip install openvino"):
        get_runtime("openvino")
    with pytest.raises(RuntimeUnavailableError, match=r"needs nncf.*pip install 'ranksearch\[nncf\]'"):
        OPENVINO.quantize_own(nn.Linear(2, 2), [], torch.ones(1, 2), TARGET)
    with pytest.raises(RuntimeUnavailableError, match=r"no int8 quantizer of its own.*ranksearch\[nncf\]"):
        RUNTIMES["torch"].quantize_own(nn.Linear(2, 2), [], torch.ones(1, 2), TARGET)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(device="tpu"), "no device 'tpu'"),
        (Target(mode="compiled"), "no mode 'compiled'"),
        (Target(runtime="torch", mode="compiled"), "no mode 'compiled'"),
        (Target(runtime="torch", device="tpu"), "no device 'tpu'"),
        (Target(runtime="torch", precision="int8"), "no precision 'int8'"),
    ],
)
def test_targets_that_cannot_be_run(target: Target, message: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message):
        get_runtime(target.runtime).check(target)


def test_inputs_that_do_not_fit_are_named() -> None:
    session = OPENVINO.prepare(nn.Linear(4, 2), torch.ones(2, 4), TARGET)
    with pytest.raises(MeasurementError, match=r"input '0' has shape \(3, 4\).*\(2, 4\)"):
        session.run(np.ones((3, 4), np.float32))
    with pytest.raises(MeasurementError, match="the model takes"):
        session.run({"x": np.ones((2, 4), np.float32)})


def test_missing_files_are_named(tmp_path: Path) -> None:
    for runtime in RUNTIMES.values():
        with pytest.raises(RuntimeUnavailableError, match="nothing"):
            runtime.open(tmp_path / "nothing", TARGET)


def test_own_int8_runs_int8_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    modules, shape = INT8_CASES["whole"]
    model, example = nn.Sequential(*copy.deepcopy(modules)).eval(), torch.randn(shape)
    session = OPENVINO.quantize_own(model, [torch.randn(7, *shape[1:]) for _ in range(4)], example, TARGET)
    assert len(int8_kernels(session.kernels())) >= 4
    assert session.run(example.numpy()).shape == (4, 10)
    assert capfd.readouterr().out == ""


class Positioned(nn.Module):
    """As transformers' BERT has it: the kinds of tokens, unless given, are gathered from a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds, self.layer = nn.Embedding(20, 16), nn.Embedding(2, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("order", torch.arange(12)[None])
        self.register_buffer("first", torch.zeros(1, 12, dtype=torch.long))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first, order = (buffer.expand(tokens.shape[0], -1) for buffer in (self.first, self.order))
        return self.layer(self.norm(self.tokens(tokens) + self.kinds(torch.gather(first, 1, order))))


def test_own_int8_takes_embeddings_of_constants() -> None:
    model, example = Positioned().eval(), torch.randint(0, 20, (4, 12))
    session = OPENVINO.quantize_own(model, [example], example, TARGET)
    wanted = model(example).detach().numpy()
    # Where sums may saturate NNCF's weights, which take all codes, are off by more.
    worst = 0.1 if OPENVINO.weight_limit(TARGET) == 127 else 0.5
    assert np.abs(session.run(example.numpy()) - wanted).max() < worst * np.abs(wanted).max()


class Queries(nn.Module):
    """As DETR has it: queries of its own attend to each other before they read anything of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.mix, self.norm, self.ask = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.register_buffer("queries", torch.randn(1, 5, 16))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        queries = self.queries.repeat(states.shape[0], 1, 1)
        parts = (layer(queries)[:, None] for layer in (self.query, self.key, self.value))
        mixed = self.mix(F.scaled_dot_product_attention(*parts)[:, 0])
        asked = self.ask(self.norm(mixed + queries))
        return F.scaled_dot_product_attention(asked[:, None], states[:, None], states[:, None])[:, 0]


@pytest.mark.parametrize("activations_rounded", [True, False])
def test_layers_that_read_constants_alone(activations_rounded: bool, tmp_path: Path) -> None:
    example = torch.randn(4, 7, 16)
    model = _quantized(Queries().eval(), example)
    if not activations_rounded:
        model = replace_modules(model, {"ask": model.ask.in_float(), "mix": model.mix.in_float()}).eval()
    with torch.no_grad():
        wanted = model(example).numpy()
    (written,) = write_portable(model, example, tmp_path, ["openvino"])
    opened = OPENVINO.open_portable(written.path, {"input_0": example.numpy()}, TARGET)
    for session in (OPENVINO.prepare(model, example, TARGET), opened):
        np.testing.assert_allclose(session.run(example.numpy()), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_sessions_with_other_threads_do_not_disturb_each_other(name: str) -> None:
    runtime, example = RUNTIMES[name], torch.randn(4, 8)
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2)]
    n_before = torch.get_num_threads()
    targets = [Target(threads=threads) for threads in (1, 2)]
    sessions = [runtime.prepare(m, example, t) for m, t in zip(models, targets, strict=True)]
    calls = [session.bind(example.numpy()) for session in sessions]
    for _ in range(3):
        for model, session, call in zip(models, sessions, calls, strict=True):
            call()
            with torch.no_grad():
                np.testing.assert_allclose(session.run(example.numpy()), model(example).numpy(), atol=1e-5)
    assert torch.get_num_threads() == n_before


def test_registered_runtime_joins_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RUNTIMES, "torch")
    with pytest.raises(RuntimeUnavailableError):
        get_runtime("torch")
    runtime = register_runtime(type(OPENVINO)())
    assert get_runtime("openvino") is runtime
    monkeypatch.setitem(RUNTIMES, "openvino", OPENVINO)
