"""ONNX Runtime: int8 kernels that really run, files that open without torch, and honest refusals."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.layers import layer_spec
from ranksearch.quantization import ActivationQuantizer, Int8, observe_ranges, quantize_module
from ranksearch.runtimes import RUNTIMES, base, get_runtime, stayed_float
from ranksearch.runtimes.onnx import kernel_profile
from ranksearch.runtimes.onnx import runtime as onnx_runtime
from ranksearch.runtimes.onnx import session as onnx_session
from ranksearch.spec import Target
from ranksearch.surgery import replace_modules
from ranksearch.testing import check_runtime

TARGET = Target(runtime="onnxruntime", threads=1, batch_size=4)
RUNTIME = RUNTIMES["onnxruntime"]
LIMIT = 64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _quantized(model: nn.Module, example: torch.Tensor, skip: tuple[str, ...] = ()) -> nn.Module:
    layers = {name: module for name, module in model.named_modules() if layer_spec(module) and name not in skip}
    model = replace_modules(model, {name: quantize_module(module, Int8(LIMIT)) for name, module in layers.items()})
    observe_ranges(model, [example])
    return model.eval()


def _with_statistics(model: nn.Module) -> nn.Module:
    """The model with BatchNorm layers that have something to fold, one gain of them zero and one negative."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            with torch.no_grad():
                module.weight[:2] = torch.tensor([0.0, -0.7])
    return model


class Residual(nn.Module):
    """A block whose second convolution is added to its input in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def _model(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "first_layer": (_model(nn.Conv2d(1, 16, 3, padding=1)), (4, 1, 8, 8)),
    "conv_norm_relu": (_model(nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()), (4, 16, 8, 8)),
    "two_convs": (
        _model(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 3, stride=2)),
        (4, 3, 9, 9),
    ),
    "pooled": (
        _model(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 3)),
        (4, 3, 12, 12),
    ),
    "pooled_signed": (_model(nn.Conv2d(3, 16, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 3)), (4, 3, 12, 12)),
    "depthwise": (_model(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)), (4, 16, 8, 8)),
    "groups": (_model(nn.Conv2d(8, 16, 3, groups=4, dilation=2)), (4, 8, 9, 9)),
    "conv1d": (_model(nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3)), (4, 8, 20)),
    "reflected": (_model(nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect")), (4, 8, 8, 8)),
    "circular": (_model(nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular")), (4, 8, 8, 8)),
    "same": (_model(nn.Conv2d(8, 16, (3, 5), padding="same")), (4, 8, 8, 8)),
    "linear": (_model(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10, bias=False)), (4, 20)),
    "linear_on_tokens": (_model(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 10, bias=False)), (4, 7, 20)),
    "residual": (_model(Residual(), Residual()), (4, 16, 8, 8)),
    "chain": (_model(nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1)), (4, 16, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_quantized_layers_multiply_integers_and_agree_with_torch(name: str, tmp_path: Path) -> None:
    dense, shape = copy.deepcopy(CASES[name])
    example = torch.randn(shape)
    model = _quantized(_with_statistics(dense).eval(), example)
    layers = [layer for layer, module in CASES[name][0].named_modules() if layer_spec(module) is not None]
    with torch.no_grad():
        expected = model(example).numpy()
    prepared = RUNTIME.prepare(model, example, TARGET)
    opened = RUNTIME.open(RUNTIME.serialise(model, example, TARGET, tmp_path), TARGET)
    for session in (prepared, opened):
        found = session.layer_kernels()
        assert sorted(found) == sorted(layers)
        assert not stayed_float(layers, found)
        # One step of rounding apart, where a value lies between two codes.
        assert np.abs(session.run(example.numpy()) - expected).max() <= 0.02 * np.abs(expected).max()


def test_a_convolution_between_quantizers_rounds_its_output_in_the_kernel() -> None:
    for name in ("two_convs", "pooled"):
        dense, shape = copy.deepcopy(CASES[name])
        model = _quantized(dense.eval(), torch.randn(shape))
        kernels = RUNTIME.prepare(model, torch.randn(shape), TARGET).layer_kernels()
        assert kernels["0"] == "QLinearConv cpu_u8"
        assert kernels["3"] == "ConvInteger cpu_u8"


def test_an_output_that_others_read_in_float_is_not_rounded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.first(x).relu()
            return x, self.second(x)

    example = torch.randn(4, 8, 6, 6)
    model = _quantized(Shared().eval(), example)
    session = RUNTIME.prepare(model, example, TARGET)
    with torch.no_grad():
        expected, _ = model(example)
    np.testing.assert_allclose(session.run(example.numpy())[0], expected.numpy(), atol=1e-5)
    assert session.layer_kernels() == {"first": "ConvInteger cpu_u8", "second": "ConvInteger cpu_u8"}


def test_a_bias_beyond_32_bits_stays_in_float() -> None:
    dense = _model(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        dense[0].weight.mul_(1e-9)
        dense[0].bias.fill_(3.0)
    example = torch.randn(4, 4, 5, 5)
    model = _quantized(dense, example)
    session = RUNTIME.prepare(model, example, TARGET)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(example.numpy()), model(example).numpy(), rtol=0.02, atol=1e-3)
    assert not stayed_float(["0", "1"], session.layer_kernels())


def test_a_layer_left_in_float_is_told_apart() -> None:
    example = torch.randn(4, 16, 8, 8)
    dense = _model(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    session = RUNTIME.prepare(_quantized(dense, example, skip=("2", "4")), example, TARGET)
    kernels = session.layer_kernels()
    assert kernels == {"0": "ConvInteger cpu_u8", "2": "Conv cpu_f32", "4": "Gemm cpu_f32"}
    assert stayed_float(["0", "2"], kernels) == {"2": "Conv cpu_f32"}


def test_a_layer_that_is_the_model_and_one_called_twice_keep_their_names() -> None:
    assert list(RUNTIME.prepare(nn.Conv2d(16, 16, 3).eval(), torch.randn(1, 16, 5, 5), TARGET).layer_kernels()) == [""]
    layer = nn.Linear(6, 6)
    session = RUNTIME.prepare(_model(layer, nn.GELU(), layer).eval(), torch.randn(1, 6), TARGET)
    assert session.layer_kernels() == {"0": "Gemm cpu_f32"}
    assert sum("Gemm" in kernel for kernel in session.kernels().values()) == 2


def test_equal_layers_keep_their_own_names() -> None:
    layer = nn.Conv2d(16, 16, 3)
    session = RUNTIME.prepare(_model(layer, copy.deepcopy(layer)).eval(), torch.randn(1, 16, 9, 9), TARGET)
    assert sorted(session.layer_kernels()) == ["0", "1"]


def test_placeholders_run_int8_kernels() -> None:
    model = _model(*[quantize_module(nn.Conv2d(16, 16, 3)) for _ in range(2)]).eval()
    kernels = RUNTIME.prepare(model, torch.randn(4, 16, 8, 8), TARGET).layer_kernels()
    assert not stayed_float(["0", "1"], kernels)


def test_a_quantizer_that_a_model_has_of_its_own_stays_where_it_is() -> None:
    quantizer = ActivationQuantizer()
    example = torch.randn(4, 8)
    with torch.no_grad():
        expected = quantizer(example).numpy()
    np.testing.assert_allclose(RUNTIME.prepare(_model(quantizer), example, TARGET).run(example.numpy()), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 64, 3), nn.Linear(256, 256)], ids=["conv", "linear"])
def test_int8_artefact_holds_int8_weights(layer: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(4, 64, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(4, 256)
    model = _quantized(_model(copy.deepcopy(layer)), example)
    path = RUNTIME.serialise(model, example, TARGET, tmp_path)
    n_weights = layer.weight.numel()
    assert path.name == "model.onnx"
    assert path.stat().st_size < 1.2 * n_weights
    assert n_weights < RUNTIME.open(path, TARGET).constant_bytes() < 1.2 * n_weights


def test_weight_limit_keeps_sums_from_saturating() -> None:
    assert RUNTIME.weight_limit(TARGET) in (64, 127)
    layer, example = nn.Linear(64, 16), torch.full((4, 64), 1.0)
    with torch.no_grad():
        layer.weight.fill_(1.0)  # every product is the largest there is
    model = _model(quantize_module(layer, Int8(RUNTIME.weight_limit(TARGET))))
    observe_ranges(model, [example])
    with torch.no_grad():
        expected = model.eval()(example).numpy()
    np.testing.assert_allclose(RUNTIME.prepare(model, example, TARGET).run(example.numpy()), expected, rtol=0.01)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 16, 3),
        nn.Conv2d(8, 8, (1, 3), stride=2),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv1d(8, 4, 3, dilation=2),
        nn.Linear(16, 10),
    ],
)
def test_supported_bits_are_those_of_kernels_that_run(layer: nn.Module) -> None:
    spec = layer_spec(layer)
    assert spec is not None
    compressed = ((8, 32), (4, 32)) if isinstance(layer, nn.Linear) else ()
    assert RUNTIME.supported_bits(spec, TARGET) == ((32, 32), (8, 8), *compressed)
    for mode in ("eager", "tensorrt"):
        assert RUNTIME.supported_bits(spec, Target(runtime="onnxruntime", device="cuda", mode=mode)) == ((32, 32),)


def test_the_model_keeps_its_state_and_its_mode() -> None:
    model = _quantized(_model(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(4, 4, 5, 5)).train()
    before = copy.deepcopy(model.state_dict())
    RUNTIME.prepare(model, torch.randn(4, 4, 5, 5), TARGET)
    assert model.training
    assert model[0].weight_format == Int8(LIMIT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


OPEN_WITHOUT_TORCH = """
import sys
import numpy as np
from pathlib import Path
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target
runtime, target = get_runtime("onnxruntime"), Target(runtime="onnxruntime", threads=1)
runtime.check(target)
session = runtime.open(Path(sys.argv[1]), target)
inputs = {"wide": np.ones((2, 6), np.float32), "narrow": np.ones((2, 3), np.float32)}
outputs = session.run(inputs)
session.bind(inputs)()
runtime.fingerprint(target), runtime.weight_limit(target), session.constant_bytes()
assert session.layer_kernels() == {"left": "Gemm cpu_f32", "right": "Gemm cpu_f32"}, session.kernels()
assert list(outputs) == ["sum", "wide"], outputs
assert "torch" not in sys.modules
print(float(outputs["sum"].sum()))
"""


class Named(nn.Module):
    """Takes named inputs and gives named outputs, one named as an input is."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, wide: torch.Tensor, narrow: torch.Tensor) -> dict[str, torch.Tensor]:
        joined = self.left(wide) + self.right(narrow)
        return {"sum": joined, "wide": joined.mean(1)}


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    model, example = Named(), {"narrow": torch.ones(2, 3), "wide": torch.ones(2, 6)}
    path = RUNTIME.serialise(model, example, TARGET, tmp_path)
    root = Path(base.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_TORCH, str(path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) == pytest.approx(float(model(**example)["sum"].detach().sum()), rel=1e-4)


def test_inputs_and_outputs_bear_the_names_of_the_mapping(tmp_path: Path) -> None:
    import onnx

    example = {"narrow": torch.ones(2, 3), "wide": torch.ones(2, 6)}
    graph = onnx.load(RUNTIME.serialise(Named(), example, TARGET, tmp_path)).graph
    assert [value.name for value in graph.input] == ["narrow", "wide"]
    assert [value.name for value in graph.output] == ["sum", "output_wide"]
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [2, 3]


def test_a_foreign_file_opens_with_one_output_or_a_tuple(tmp_path: Path) -> None:
    import onnx

    path = RUNTIME.serialise(nn.Linear(3, 2), torch.ones(2, 3), TARGET, tmp_path)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert RUNTIME.open(path, TARGET).run(np.ones((2, 3), np.float32)).shape == (2, 2)


def test_options_leave_nothing_to_defaults() -> None:
    options = RUNTIME.options(Target(runtime="onnxruntime", threads=2))
    assert options["intra_op_num_threads"] == 2
    settings = onnx_session.session_settings(options)
    assert settings.intra_op_num_threads == 2
    assert settings.inter_op_num_threads == 1
    assert settings.graph_optimization_level.name == options["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert settings.execution_mode.name == options["execution_mode"] == "ORT_SEQUENTIAL"
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'ranksearch\[onnxruntime\]'"):
        get_runtime("onnxruntime")
    assert get_runtime("openvino").name == "openvino"
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(RuntimeUnavailableError, match=r"needs onnx, .*'ranksearch\[onnxruntime\]'"):
        get_runtime("onnxruntime")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "no device 'tpu' with mode 'eager'; it has 'cpu' with mode 'eager', 'cuda'"),
        ({"mode": "compiled"}, "no device 'cpu' with mode 'compiled'"),
        ({"device": "cuda:x"}, "no device 'cuda:x'"),
        ({"precision": "bf16"}, "no precision 'bf16'; it has f32, default"),
        ({"device": "cuda"}, "needs CUDAExecutionProvider.*offers .*CPUExecutionProvider.*onnxruntime-gpu"),
        ({"device": "cuda:1", "mode": "tensorrt"}, "needs TensorrtExecutionProvider"),
    ],
)
def test_targets_that_cannot_be_run(settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = onnx_session.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match=message):
        RUNTIME.check(Target(runtime="onnxruntime", **settings))


class Unconvertible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(capfd: pytest.CaptureFixture[str]) -> None:
    model = _model(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Unconvertible()))
    with pytest.raises(MeasurementError, match=r"layer '1\.1'\).*aten::special_bessel_j0"):
        RUNTIME.prepare(model, torch.randn(2, 4), TARGET)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(MeasurementError, match=r"ONNX: .*aten::special_bessel_j0"):
        RUNTIME.prepare(Unconvertible(), torch.randn(2, 4), TARGET)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MeasurementError, match="cannot open the model"):
        RUNTIME.open(path, TARGET)


def test_inputs_that_do_not_fit_are_named() -> None:
    session = RUNTIME.prepare(nn.Linear(4, 2), torch.ones(2, 4), TARGET)
    with pytest.raises(MeasurementError, match=r"input '0' has shape \(3, 4\).*\(2, 4\)"):
        session.run(np.ones((3, 4), np.float32))
    with pytest.raises(MeasurementError, match="the model takes"):
        session.run({"x": np.ones((2, 4), np.float32)})


def test_own_int8_runs_int8_kernels_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    dense, shape = copy.deepcopy(CASES["two_convs"])
    example = torch.randn(shape)
    model = _with_statistics(dense).eval()
    with torch.no_grad():
        expected = model(example).numpy()
    batches = [torch.randn(7, *shape[1:]) for _ in range(4)]
    session = RUNTIME.quantize_own(model, [example, *batches], example, TARGET)
    assert not stayed_float(["0", "3"], session.layer_kernels())
    assert np.abs(session.run(example.numpy()) - expected).max() < 0.1 * np.abs(expected).max()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(MeasurementError, match="needs 4 calibration examples"):
        RUNTIME.quantize_own(model, [example[:3]], example, TARGET)


class CudaStandIn:
    """As much of onnxruntime as a CUDA session takes, computing on the CPU; notes what it was asked."""

    def __init__(self, started: list[str]) -> None:
        self.real = onnx_session.load_onnxruntime()
        self.started = started
        self.asked: list[Any] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, settings: Any, providers: list[Any]) -> Any:
        self.asked.append(providers)
        session = self.real.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            get_providers=lambda: self.started,
            disable_fallback=session.disable_fallback,
            get_modelmeta=session.get_modelmeta,
            get_inputs=session.get_inputs,
            get_outputs=session.get_outputs,
            run=session.run,
            io_binding=lambda: SimpleNamespace(
                bind_ortvalue_input=lambda name, value: self.asked.append(("input", name, value)),
                bind_output=lambda *place: self.asked.append(("output", *place)),
                synchronize_outputs=lambda: self.asked.append("synchronised"),
            ),
            run_with_iobinding=lambda binding: self.asked.append("ran"),
        )

    def _value(self, array: Any, device: str, device_id: int) -> Any:
        return (array.shape, device, device_id)


@pytest.mark.parametrize(
    ("mode", "provider"), [("eager", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_cuda_binds_inputs_once_and_waits_for_outputs(
    mode: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin = CudaStandIn([provider, "CPUExecutionProvider"])
    for module in (onnx_runtime, onnx_session):
        monkeypatch.setattr(module, "load_onnxruntime", lambda: standin)
    target = Target(runtime="onnxruntime", device="cuda:1", mode=mode)
    RUNTIME.check(target)
    session = RUNTIME.prepare(nn.Linear(4, 2), torch.ones(3, 4), target)
    assert session.run(np.ones((3, 4), np.float32)).shape == (3, 2)
    call = session.bind(np.ones((3, 4), np.float32))
    assert standin.asked == [
        [(provider, {"device_id": 1}), "CPUExecutionProvider"],
        ("input", "input_0", ((3, 4), "cuda", 1)),
        ("output", "output_0", "cuda", 1),
    ]
    call()
    call()
    assert standin.asked[3:] == ["ran", "synchronised", "ran", "synchronised"]


def test_a_provider_that_does_not_start_is_no_cpu_in_disguise(monkeypatch: pytest.MonkeyPatch) -> None:
    standin = CudaStandIn(["CPUExecutionProvider"])
    for module in (onnx_runtime, onnx_session):
        monkeypatch.setattr(module, "load_onnxruntime", lambda: standin)
    with pytest.raises(RuntimeUnavailableError, match="could not start it, and would run on CPUExecutionProvider"):
        RUNTIME.prepare(nn.Linear(4, 2), torch.ones(3, 4), Target(runtime="onnxruntime", device="cuda"))


def test_gpus_get_quantizers_and_no_operator_of_the_cpu(tmp_path: Path) -> None:
    import onnx

    dense, shape = copy.deepcopy(CASES["two_convs"])
    example = torch.randn(shape)
    model = _quantized(_with_statistics(dense).eval(), example)
    target = Target(runtime="onnxruntime", device="cuda", mode="tensorrt")
    written = onnx.load(RUNTIME.serialise(model, example, target, tmp_path))
    kinds = {node.op_type for node in written.graph.node}
    assert kinds == {"QuantizeLinear", "DequantizeLinear", "Conv", "Clip"}
    with torch.no_grad():
        expected = model(example).numpy()
    outputs = RUNTIME.open(tmp_path / "model.onnx", TARGET).run(example.numpy())
    assert np.abs(outputs - expected).max() <= 0.02 * np.abs(expected).max()


def test_kernels_of_layers_are_found_under_the_names_that_onnxruntime_makes_of_theirs() -> None:
    kernels = {
        "layer:a.0#1_nchwc": "Conv cpu_f32",
        "fused layer:b#1": "FusedConv cpu_f32",
        "layer:c#1": "QLinearConv cpu_u8",
        "layer:c#2/MatMulAddFusion": "Gemm cpu_f32",
        "layer:c#1/Relu": "Relu cpu_f32",
        "output_0_nchwc": "Conv cpu_f32",
    }
    assert kernel_profile.kernels_of_layers(kernels, {"output_0": "d"}) == {
        "a.0": "Conv cpu_f32",
        "b": "FusedConv cpu_f32",
        "c": "Gemm cpu_f32",
        "d": "Conv cpu_f32",
    }


def test_keeps_the_contract() -> None:
    check_runtime(RUNTIME, TARGET)
