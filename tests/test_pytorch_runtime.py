"""The torch runtime on a CPU: modes, precisions, names of what ran, and the settings that stay the process's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn

from ranksearch.compression import rebuild
from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.plan import LayerChoice, Plan
from ranksearch.runtimes import get_runtime
from ranksearch.runtimes.pytorch.compilation import Compiled
from ranksearch.runtimes.pytorch.runtime import COMBINATIONS, TorchRuntime
from ranksearch.spec import Target
from ranksearch.testing import check_runtime

RUNTIME = TorchRuntime()
TOLERANCE = {"f32": 1e-5, "default": 1e-5, "f16": 2e-3, "bf16": 2e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def on_cpu(**changes: Any) -> Target:
    return Target(**{"runtime": "torch", "threads": 1, "batch_size": 2} | changes)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()  # fmt: skip


class Repeated(nn.Module):
    """Calls one layer three times, and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            for block in self.blocks:
                inputs = block(self.first(inputs))
        return inputs * self.scale


class Interrupted(nn.Module):
    """Two layers between which dynamo must leave its graph, and one after a loop that it leaves to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.before(inputs)
        torch._dynamo.graph_break()
        return self.after(inputs)


class Settled(nn.Module):
    """Notes the settings under which it is called."""

    seen: list[tuple[int, str, bool]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        now = (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled())
        self.seen.append(now)
        return inputs + 1


def agree(got: np.ndarray[Any, Any], wanted: torch.Tensor, tolerance: float) -> None:
    reference = wanted.detach().numpy()
    assert np.abs(got - reference).max() <= tolerance * np.abs(reference).max()


@pytest.mark.parametrize("precision", COMBINATIONS["cpu"]["eager"])
def test_outputs_are_the_models_in_every_precision(precision: str, tmp_path: Path) -> None:
    model, example, target = network(), torch.randn(2, 3, 8, 8), on_cpu(precision=precision)
    with torch.no_grad():
        expected = model(example)
    opened = RUNTIME.open(RUNTIME.serialise(model, example, target, tmp_path), target)
    for session in (RUNTIME.prepare(model, example, target), opened):
        outputs = session.run(example.numpy())
        assert outputs.dtype == np.float32
        agree(outputs, expected, TOLERANCE[precision])
        session.bind(example.numpy())()
    if precision in ("f16", "bf16"):
        assert np.abs(outputs - expected.numpy()).max() > 0, "half precision rounds"
        assert session.constant_bytes() < RUNTIME.prepare(model, example, on_cpu()).constant_bytes()


@pytest.mark.slow
def test_the_compiled_model_gives_the_same_outputs_under_inductors_name(tmp_path: Path) -> None:
    model, example, target = network(), torch.randn(2, 3, 8, 8), on_cpu(mode="compile", precision="bf16")
    with torch.no_grad():
        expected = model(example)
    session = RUNTIME.prepare(model, example, target)
    agree(session.run(example.numpy()), expected, TOLERANCE["bf16"])
    assert session.layer_kernels() == {"0": "Conv2d inductor_bf16", "5": "Linear inductor_bf16"}
    assert session.kernels() == {
        "graph 0": "Graph inductor_bf16",
        "0": "Conv2d inductor_bf16",
        "1": "BatchNorm2d inductor_bf16",
        "5": "Linear inductor_bf16",
    }


@pytest.mark.slow
def test_contract_holds_compiled() -> None:
    check_runtime(get_runtime("torch"), on_cpu(mode="compile"))


class Flattening(nn.Module):
    """Reads the numbers of its activations in their order, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(512, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(images).relu()
        return self.classifier(hidden.view(len(hidden), -1))


@pytest.mark.parametrize("name", ["flattening", "volumes"])
def test_a_model_that_cannot_have_channels_last_runs_as_it_is(name: str, tmp_path: Path) -> None:
    models = {"flattening": Flattening(), "volumes": nn.Sequential(nn.Conv3d(3, 4, 2), nn.Flatten())}
    examples = {"flattening": torch.randn(2, 3, 8, 8), "volumes": torch.randn(2, 3, 4, 4, 4)}
    model, example, target = models[name].eval(), examples[name], on_cpu()
    opened = RUNTIME.open(RUNTIME.serialise(model, example, target, tmp_path), target)
    for session in (RUNTIME.prepare(model, example, target), opened):
        with torch.no_grad():
            agree(session.run(example.numpy()), model(example), TOLERANCE["f32"])


@pytest.mark.slow
def test_an_exported_model_compiles_too(tmp_path: Path) -> None:
    model, example, target = network(), torch.randn(2, 3, 8, 8), on_cpu(mode="compile")
    session = RUNTIME.open(RUNTIME.serialise(model, example, target, tmp_path), target)
    with torch.no_grad():
        agree(session.run(example.numpy()), model(example), TOLERANCE["f32"])
    assert session.layer_kernels() == {"0": "Conv2d inductor_f32", "5": "Linear inductor_f32"}


@pytest.mark.slow
def test_many_models_of_one_class_are_each_compiled_with_their_own_weights() -> None:
    example = torch.randn(2, 4)
    # Dynamo leaves the ninth of a class alone, unless each stands on its own.
    models = [nn.Sequential(nn.Linear(4, 4)).eval() for _ in range(10)]
    sessions = [RUNTIME.prepare(model, example, on_cpu(mode="compile")) for model in models]
    for model, session in zip(models, sessions, strict=True):
        assert session.layer_kernels() == {"0": "Linear inductor_f32"}
        with torch.no_grad():
            agree(session.run(example.numpy()), model(example), TOLERANCE["f32"])


def test_a_model_that_dynamo_must_leave_runs_as_several_graphs() -> None:
    model, example = Interrupted().eval(), torch.randn(2, 4)
    session = RUNTIME.prepare(model, example, on_cpu(mode="compile"))
    with torch.no_grad():
        agree(session.run(example.numpy()), model(example), TOLERANCE["f32"])
    kernels = session.kernels()
    assert [name for name in kernels if name.startswith("graph ")] == ["graph 0", "graph 1"]
    assert session.layer_kernels() == {"before": "Linear inductor_f32", "after": "Linear inductor_f32"}


def test_a_part_that_dynamo_leaves_alone_is_told_as_eager() -> None:
    # A break within Sequential's own loop: dynamo skips the whole frame.
    model, example = nn.Sequential(nn.Linear(4, 4), Interrupted(), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    session = RUNTIME.prepare(model, example, on_cpu(mode="compile"))
    with torch.no_grad():
        agree(session.run(example.numpy()), model(example), TOLERANCE["f32"])
    kernels = session.layer_kernels()
    assert kernels["0"] == kernels["2"] == "Linear eager_f32"
    assert kernels["1.before"] == kernels["1.after"] == "Linear inductor_f32"


def test_a_compiled_model_refuses_to_be_compiled_anew() -> None:
    model = nn.Linear(4, 4).eval()
    with torch.inference_mode():
        compiled = Compiled(model)
        compiled.compile(torch.randn(2, 4))
        compiled(torch.randn(2, 4))
        with pytest.raises(MeasurementError, match="Linear would be compiled anew while it is timed"):
            compiled(torch.randn(3, 4))


def test_compiling_without_a_compiler_is_refused_with_what_is_missing() -> None:
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(RuntimeUnavailableError, match=r"no no-such-compiler: install g\+\+, or set CXX"):
            RUNTIME.check(on_cpu(mode="compile"))
        RUNTIME.check(on_cpu())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "compiled"}, "no mode 'compiled' on cpu; it has eager, compile$"),
        ({"mode": "cuda_graph"}, "no mode 'cuda_graph' on cpu.*needs a CUDA device"),
        ({"precision": "tf32"}, "no precision 'tf32' on cpu; it has f32, bf16, f16, default"),
        ({"device": "tpu"}, "no device 'tpu'; it has cpu, and cuda"),
        ({"device": "cuda:x"}, "no device 'cuda:x'"),
        ({"device": "cuda", "precision": "int8"}, "no precision 'int8' on cuda; it has f32, tf32, bf16, f16, default"),
    ],
)
def test_targets_that_cannot_be_run_are_refused_with_those_that_can(changes: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message):
        RUNTIME.check(on_cpu(**changes))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
@pytest.mark.parametrize("mode", COMBINATIONS["cuda"])
def test_a_torch_without_cuda_says_so(mode: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no device 'cuda' here: torch .* was built without CUDA.*cpu"):
        RUNTIME.check(on_cpu(device="cuda", mode=mode))


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_other_shapes_names_and_types_are_refused(mode: str, tmp_path: Path) -> None:
    model, example, target = nn.Linear(4, 2), torch.ones(2, 4), on_cpu(mode=mode)
    opened = RUNTIME.open(RUNTIME.serialise(model, example, target, tmp_path), target)
    for session in (RUNTIME.prepare(model, example, target), opened):
        for use in (session.run, session.bind):
            with pytest.raises(MeasurementError, match=r"input '0' has shape \(3, 4\).*prepared for \(2, 4\)"):
                use(np.ones((3, 4), np.float32))
            with pytest.raises(MeasurementError, match=r"inputs are \['x'\]; the model takes \['0'\]"):
                use({"x": np.ones((2, 4), np.float32)})
            with pytest.raises(MeasurementError, match=r"input '0' has type torch.int64"):
                use(np.ones((2, 4), np.int64))


def test_names_come_in_any_order_and_float64_is_taken_as_the_examples_type() -> None:
    class Difference(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left - right

    session = RUNTIME.prepare(Difference(), {"left": torch.ones(1, 2), "right": torch.ones(1, 2)}, on_cpu())
    outputs = session.run({"right": np.full((1, 2), 3.0), "left": np.full((1, 2), 5.0)})
    np.testing.assert_array_equal(outputs, np.full((1, 2), 2.0, np.float32))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_token_ids_stay_whole(precision: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(3000, 4), nn.Linear(4, 3)).eval()
    # 2999 is no bfloat16.
    tokens, target = torch.tensor([[2999, 1], [7, 2047]]), on_cpu(precision=precision)
    with torch.no_grad():
        expected = model(tokens)
    opened = RUNTIME.open(RUNTIME.serialise(model, tokens, target, tmp_path), target)
    for session in (RUNTIME.prepare(model, tokens, target), opened):
        agree(session.run(tokens.numpy()), expected, TOLERANCE[precision])
        agree(session.run(tokens.numpy().astype(np.int32)), expected, TOLERANCE[precision])


def test_layers_keep_their_names_through_the_file(tmp_path: Path) -> None:
    factored = rebuild(network(), Plan(layers={"0": LayerChoice(decomposition="tucker2", ranks=(4, 2))}))
    for model, example in ((factored, torch.randn(2, 3, 8, 8)), (Repeated(), torch.randn(2, 4))):
        prepared = RUNTIME.prepare(model, example, on_cpu())
        opened = RUNTIME.open(RUNTIME.serialise(model, example, on_cpu(), tmp_path), on_cpu())
        assert len(prepared.layer_kernels()) > 1
        assert opened.layer_kernels() == prepared.layer_kernels()
        assert opened.kernels() == prepared.kernels()
    assert prepared.kernels() == {
        "": "Repeated eager_f32",
        "first": "Linear eager_f32",
        "blocks.0.0": "Linear eager_f32",
    }
    assert prepared.layer_kernels() == {"first": "Linear eager_f32", "blocks.0.0": "Linear eager_f32"}


def test_a_file_of_another_precision_is_refused(tmp_path: Path) -> None:
    model, example = nn.Linear(4, 2), torch.ones(2, 4)
    path = RUNTIME.serialise(model, example, on_cpu(precision="bf16"), tmp_path)
    with pytest.raises(RuntimeUnavailableError, match="model.pt2 holds a model in bfloat16; .*precision 'f32'"):
        RUNTIME.open(path, on_cpu())
    path = RUNTIME.serialise(model, example, on_cpu(), tmp_path)
    with pytest.raises(RuntimeUnavailableError, match="model.pt2 holds a model in float32; .*precision 'f16'"):
        RUNTIME.open(path, on_cpu(precision="f16"))


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs if float(inputs.sum()) > 0 else -inputs

    with pytest.raises(MeasurementError, match="torch.export cannot export Branching"):
        RUNTIME.serialise(Branching(), torch.ones(2, 2), on_cpu(), tmp_path)


def test_the_target_settings_hold_while_it_runs_and_the_process_keeps_its_own() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        session = RUNTIME.prepare(Settled(), torch.ones(1), on_cpu(threads=2))
        call = session.bind(np.ones(1, np.float32))
        Settled.seen.clear()
        session.run(np.ones(1, np.float32))
        call()
        assert Settled.seen == [(2, "highest", True)] * 2
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == 1
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_settings_come_back_where_the_model_fails() -> None:
    class Failing(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        RUNTIME.prepare(Failing(), torch.ones(1), on_cpu(threads=2))
    assert torch.get_num_threads() == 1
    assert not torch.is_inference_mode_enabled()


def test_neither_model_nor_inputs_are_shared_with_the_caller() -> None:
    model, example = nn.Sequential(nn.Conv2d(1, 1, 1)).train(), np.ones((1, 1, 2, 2), np.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = RUNTIME.prepare(model, torch.as_tensor(example), on_cpu(precision="bf16"))
    first = session.run(example)
    with torch.no_grad():
        model[0].weight.zero_()
    np.testing.assert_array_equal(session.run(example), first)
    assert model.training and model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].bias, before["0.bias"])


def test_records_tell_what_was_set() -> None:
    options = RUNTIME.options(on_cpu(mode="compile", precision="bf16"))
    assert json.loads(json.dumps(options)) == {
        "mode": "compile",
        "memory_format": "channels_last where the model allows it",
        "precision": "bf16",
        "threads": 1,
        "cache": "warm",
        "float32_matmul_precision": "highest",
        "freezing": "True",
    }
    gpu = RUNTIME.options(on_cpu(device="cuda", precision="tf32"))
    assert (gpu["float32_matmul_precision"], gpu["cudnn_allow_tf32"]) == ("high", "True")
    assert "freezing" not in gpu
    gpu = RUNTIME.options(on_cpu(device="cuda", precision="f32"))
    assert (gpu["float32_matmul_precision"], gpu["cudnn_allow_tf32"], gpu["cache"]) == ("highest", "False", "warm")
    assert RUNTIME.fingerprint(on_cpu())["torch"] == torch.__version__
