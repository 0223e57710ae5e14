"""Models as people have them: wrapped, of other floats, with nested outputs, called by keyword and more than once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from tiny_study import INT8, SVD, Pairs, make_spec, plans
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.portable import write_portable
from ranksearch.surgery import copy_model, unwrapped, wrappers
from ranksearch.workbench import open_workbench


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A group of one process, without which there is no DistributedDataParallel."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def inner_compiled(model: nn.Module) -> nn.Module:
    copied = copy_model(model)
    assert isinstance(copied, nn.Sequential)
    copied[8] = torch.compile(copied[8])  # type: ignore[assignment]
    return copied


def compiled_in_place(model: nn.Module) -> nn.Module:
    copied = copy_model(model)
    copied.compile()
    return copied


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": lambda model: nn.parallel.DistributedDataParallel(copy_model(model)),
    "DataParallel of torch.compile": lambda model: nn.DataParallel(torch.compile(model)),
    "a layer of it": inner_compiled,
    "compile()": compiled_in_place,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_compressed_saved_and_loaded_as_the_one_inside(
    kind: str, alone: Any, model: nn.Sequential, parts: dict[str, Pairs], tmp_path: Path
) -> None:
    wrapped, plan = WRAPPERS[kind](model), plans()["mixed"]
    batches = parts["train"][:2]
    compressed = rs.compress(wrapped, plan, calibration=batches)
    wanted = rs.compress(model, plan, calibration=batches)
    assert type(compressed) is nn.Sequential and not wrappers(compressed)
    with torch.no_grad():
        outputs = wanted(batches[0][0])
        assert torch.equal(compressed(batches[0][0]), outputs)
    assert rs.rebuild(wrapped, plan).state_dict().keys() == wanted.state_dict().keys()
    rs.save(WRAPPERS[kind](compressed) if "layer" not in kind else compressed, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(rs.load(tmp_path, wrapped)(batches[0][0]), outputs)


def test_a_study_takes_the_model_inside_and_says_so(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    bench = open_workbench(make_spec(model, parts, model=lambda: nn.DataParallel(torch.compile(model))))
    assert list(bench.found.layers) == ["0", "3", "8", "10"] and type(bench.model) is nn.Sequential
    assert bench.notes == (
        "the model is taken out of DataParallel and torch.compile; layers bear the names that they have inside",
    )


def test_what_is_not_wrapped_is_itself_and_a_module_of_that_name_is_no_wrapper(model: nn.Sequential) -> None:
    class DataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    own = DataParallel()
    assert unwrapped(model) is model and unwrapped(own) is own and wrappers(own) == ()
    assert unwrapped(nn.DataParallel(model)) is model


def test_a_model_with_a_computed_weight_is_copied_once_it_was_trained(parts: dict[str, Pairs]) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(64, 32))
    model = nn.Sequential(nn.Flatten(), normed, nn.ReLU(), nn.Linear(32, 10))
    images = parts["train"][0][0]
    model(images).sum().backward()
    compressed = rs.compress(model, rs.Plan(layers={"3": SVD}), calibration=parts["train"][:1])
    assert compressed[1].weight_g is not normed.weight_g
    with torch.no_grad():
        torch.testing.assert_close(compressed[1](images.flatten(1)), normed(images.flatten(1)))


CHOICES = {
    "svd": {"8": SVD},
    "convolutions": {
        "0": rs.LayerChoice(decomposition="spatial_svd", ranks=(3,)),
        "3": rs.LayerChoice(decomposition="tucker2", ranks=(8, 6)),
    },
    "weights of 16 and 4 bits": {
        "8": rs.LayerChoice(weight_bits=4, activation_bits=32),
        "3": rs.LayerChoice(weight_bits=16, activation_bits=32),
    },
    "8 bits": {"0": INT8, "8": SVD.model_copy(update={"weight_bits": 8, "activation_bits": 8}), "10": INT8},
}


class Lowered(nn.Module):
    """Convolutions in float32, and what follows in bfloat16."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        for name, module in copy_model(model).named_children():
            self.add_module(name, module if int(name) < 8 else module.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            x = module(x.to(torch.bfloat16) if name == "8" else x)
        return x


def lowered(model: nn.Sequential, kind: Any) -> nn.Module:
    return Lowered(model) if kind == "mixed" else copy_model(model).to(kind)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, "mixed"], ids=str)
def test_models_of_other_floats_are_compressed_in_them_saved_and_loaded(
    kind: Any, choices: str, model: nn.Sequential, parts: dict[str, Pairs], tmp_path: Path
) -> None:
    plan, dense = rs.Plan(layers=CHOICES[choices]), lowered(model, kind)
    wide, dtype = parts["train"][:3], torch.float32 if kind == "mixed" else kind
    batches = [(images.to(dtype), labels) for images, labels in wide]
    compressed = rs.compress(dense, plan, calibration=batches, loss=F.cross_entropy)
    assert {p.dtype for p in compressed.parameters()} == {p.dtype for p in dense.parameters()}
    saved = rs.save(compressed, plan, tmp_path, calibration=batches)
    loaded = rs.load(tmp_path, dense)
    with torch.no_grad():
        outputs = compressed(batches[0][0])
        assert outputs.dtype == (torch.bfloat16 if kind == "mixed" else kind)
        assert torch.equal(loaded(batches[0][0]), outputs)
        # What is factored and rounded in float32 does about as well.
        wanted = model(wide[0][0])
        in_float = rs.compress(model, plan, calibration=wide, loss=F.cross_entropy)(wide[0][0])
    own, other = (float((o.float() - wanted).norm() / wanted.norm()) for o in (outputs, in_float))
    assert own < 1.2 * other + 0.02
    assert saved.provenance is not None and saved.provenance.sha256


def test_studies_and_measurements_of_other_floats_say_what_to_do(
    model: nn.Sequential, parts: dict[str, Pairs], tmp_path: Path
) -> None:
    told = r"parameter '0.weight' is bfloat16, .*give model.float\(\), and Target\(precision='bf16'\)"
    half, images = lowered(model, torch.bfloat16), parts["train"][0][0][:2]
    with pytest.raises(rs.StudyError, match=told):
        open_workbench(make_spec(half, parts))
    with pytest.raises(rs.MeasurementError, match=told):
        rs.measure_latency(half, half, rs.Target(batch_size=2), images)
    with pytest.raises(rs.MeasurementError, match=told):
        write_portable(half, images, tmp_path, ["onnx"])
    with pytest.raises(rs.StudyError, match=r"'8.weight' is bfloat16"):
        open_workbench(make_spec(Lowered(model), parts))
    with pytest.raises(rs.StudyError, match=r"is float64, .*: give model.float\(\)$"):
        open_workbench(make_spec(lowered(model, torch.float64), parts))
