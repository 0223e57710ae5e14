"""Models as people have them: wrapped, of other floats, with nested outputs, called by keyword and more than once."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from tiny_study import INT8, SVD, Pairs, make_spec, plans
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

import ranksearch as rs
from ranksearch.export import named_values
from ranksearch.finding import compressible_layers
from ranksearch.load_example import loading_script
from ranksearch.portable import FORMATS, write_portable
from ranksearch.runtimes import get_runtime
from ranksearch.statistics import LayerStatistics, collect
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


@dataclass
class Found:
    """What a detector gives: nested, with what is no tensor."""

    logits: Tensor
    states: tuple[Tensor, ...]
    boxes: Tensor | None = None
    n_classes: int = 4


class Pair(NamedTuple):
    logits: Tensor
    states: dict[str, Tensor]


class Attributes(dict[str, Tensor]):
    """A dict whose values are read as attributes."""

    __getattr__ = dict.__getitem__


class Attending(nn.Module):
    """Takes a mask by keyword; calls layers by keyword, several times, under a checkpoint; gives what `give` makes."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.give, self.reentrant = give, False

    def forward(self, rows: Tensor, *, mask: Tensor) -> Any:
        embedded = self.embed(input=rows)
        mixed = F.relu(checkpoint(self.mix, embedded, use_reentrant=self.reentrant))
        mixed = mixed + self.mix(embedded.mean(1))[:, None]
        pooled = (mixed * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.give(self.head(input=pooled), mixed)


def masked(n: int) -> dict[str, Tensor]:
    return {"rows": torch.randn(n, 5, 6), "mask": (torch.arange(5) < torch.randint(2, 6, (n, 1))).float()}


GIVEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "a dataclass": (lambda logits, mixed: Found(logits, (mixed, mixed.mean(1))), lambda o: o.logits),
    "a named tuple": (lambda logits, mixed: Pair(logits, {"mixed": mixed}), lambda o: o.logits),
    "transformers'": (
        lambda logits, mixed: SequenceClassifierOutput(logits=logits, hidden_states=(mixed,)), lambda o: o.logits
    ),
    "nested dicts": (lambda logits, mixed: {"out": {"logits": logits}, "no": None, "mixed": [mixed]},
                     lambda o: o["out"]["logits"]),
    "a dict with attributes": (lambda logits, mixed: Attributes(logits=logits, mixed=mixed), lambda o: o.logits),
    "a tuple with None": (lambda logits, mixed: (logits, None), lambda o: o[0]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "runtime"), [*((kind, "openvino") for kind in GIVEN), ("a dataclass", "torch")])
def test_outputs_of_any_structure_are_scored_alike_on_a_runtime(kind: str, runtime: str) -> None:
    give, logits = GIVEN[kind]
    torch.manual_seed(0)
    model = Attending(give).eval()
    batches = [(masked(32), torch.randint(0, 4, (32,))) for _ in range(4)]
    spec = make_spec(
        model, dict.fromkeys(("train", "validation", "test"), batches),
        loss=lambda o, y: F.cross_entropy(logits(o), y),
        score=rs.corpus_score(lambda o, y: float((logits(o).argmax(1) == y).float().mean())),
        target=rs.Target(runtime=runtime, batch_size=8, threads=1),
    )  # fmt: skip
    bench = open_workbench(spec)
    plan = rs.Plan(layers={"embed": SVD, "mix": INT8, "head": INT8})
    compressed = rs.compress(bench.model, plan, calibration=batches, loss=spec.loss, weight_limit=bench.weight_limit)
    opened = bench.as_model(bench.prepare(compressed))
    inputs = batches[0][0]
    with torch.no_grad():
        native, own = compressed(**inputs), opened(**inputs)
    assert type(own) is type(native)
    torch.testing.assert_close(logits(own), logits(native), rtol=0.05, atol=0.02)
    in_torch, on_runtime = bench.score(compressed, batches), bench.score(opened, batches)
    assert abs(in_torch.value - on_runtime.value) < 0.05


@pytest.mark.parametrize("give", [lambda logits, mixed: Found(logits, (mixed,)), lambda logits, _: (logits, {})])
def test_nested_outputs_are_exported_under_dotted_names(give: Any, tmp_path: Path) -> None:
    model, inputs = Attending(give).eval(), masked(4)
    write_portable(model, inputs, tmp_path, list(FORMATS))
    with torch.no_grad():
        names = list(named_values(model(**inputs)))
    assert names == (["logits", "states.0"] if len(names) == 2 else ["0"])
    session = get_runtime("torch").open_portable(
        tmp_path / "portable.pt2", {k: v.numpy() for k, v in inputs.items()}, rs.Target(runtime="torch", batch_size=4)
    )
    assert list(named_values(session.run({k: v.numpy() for k, v in inputs.items()}))) == names


def test_the_script_of_an_export_folder_names_outputs_as_its_example_does() -> None:
    script: dict[str, Any] = {"__name__": "load_example", "__file__": "load_example.py"}
    exec(loading_script(rs.Plan(layers={}), nn.Identity(), torch.ones(1)), script)
    x, y = torch.ones(2, 3), torch.zeros(2)
    for outputs in (x, (x, None), Found(x, (x, y)), Pair(x, {"a": y}), {"out": [x, {"b": y}]},
                    SequenceClassifierOutput(logits=x, hidden_states=(x, y))):  # fmt: skip
        named = script["named"](outputs)
        assert list(named) == list(named_values(outputs))
        assert all(torch.equal(named[name], value) for name, value in named_values(outputs).items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_checkpoint_changes_no_statistics() -> None:
    def collected(reentrant: bool | None) -> Any:
        torch.manual_seed(0)
        model = Attending(lambda logits, _: logits).eval()
        model.reentrant = bool(reentrant)
        batches = [(masked(32), torch.zeros(32)) for _ in range(3)]
        layers = compressible_layers(model, batches[0][0]).layers
        if reentrant is None:
            model_checkpoint = pytest.MonkeyPatch()
            model_checkpoint.setitem(globals(), "checkpoint", lambda layer, x, use_reentrant: layer(x))
            try:
                return collect(model, layers, batches, F.cross_entropy)
            finally:
                model_checkpoint.undo()
        return collect(model, layers, batches, F.cross_entropy)

    wanted, *others = (collected(reentrant) for reentrant in (None, False, True))
    for found in others:
        for name, statistics in wanted.items():
            for field in fields(LayerStatistics):
                assert torch.equal(getattr(found[name], field.name), getattr(statistics, field.name)), (name, field)


def test_where_the_model_wants_no_gradients_there_are_none() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    model, batches = Frozen().eval(), [(torch.randn(64, 6), torch.zeros(64))]
    found = collect(model, compressible_layers(model, batches[0][0]).layers, batches, F.cross_entropy)
    assert found["body"].output_gradient_covariance is None and found["body"].input_covariance is not None
    assert found["head"].weight_gradients is not None


class Named(nn.Module):
    """Takes two tensors by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(rows)


BAD_INPUTS: list[tuple[Callable[[], nn.Module], Any, str]] = [
    (Named, {"rows": torch.ones(16, 6), "labels": torch.ones(16)},
     r"the inputs' keys are rows, labels, and Named.forward takes \(rows, mask=None\): .*'labels'"),
    (Named, {"mask": torch.ones(16)}, r"the inputs' keys are mask, and Named.forward takes .*'rows'"),
    (Named, (torch.ones(16, 6),) * 3, r"the inputs' number is 3, and Named.forward takes \(rows, mask=None\)"),
    (Named, torch.ones(16, 6, device="meta"),
     r"input '0' is on meta, and parameter 'head.weight' on cpu; .*give model.to\('meta'\)"),
    (lambda: Named().to("meta"), torch.ones(16, 6), r"parameter 'head.weight' is on device meta, .*load the model's"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "told"), BAD_INPUTS)
def test_data_that_does_not_fit_the_model_is_told_by_name(make: Any, inputs: Any, told: str) -> None:
    batches = [(inputs, torch.zeros(16, dtype=torch.long))]
    with pytest.raises(rs.StudyError, match=f"^study 'tiny': {told}"):
        open_workbench(make_spec(make(), dict.fromkeys(("train", "validation", "test"), batches)))
    with pytest.raises(rs.StudyError, match=f"^{told}"):
        rs.compress(make(), rs.Plan(layers={"head": SVD.model_copy(update={"ranks": (2,)})}), calibration=batches)


def test_data_of_other_floats_is_told(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    wide = {name: [(x.double(), y) for x, y in batches] for name, batches in parts.items()}
    with pytest.raises(rs.StudyError, match="input '0' is float64, and the model's parameters are float32; give it as"):
        open_workbench(make_spec(model, wide))


def test_ties_share_bits_across_shapes_where_they_can(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    def opened(**changes: Any) -> Any:
        space = rs.Space(ties=(("3", "8"),), weight_bits=(32, 8, 4))
        target = rs.Target(batch_size=16, threads=1)
        return open_workbench(make_spec(model, parts, target=target, **{"space": space, **changes}))

    opened()
    of_four = {"space": rs.Space(ties=(("3", "8"),), weight_bits=(32, 4)), "objectives": ("drop", "latency")}
    told = "on openvino layer '3' takes bits 32/32 and '8', tied to it, 32/32 and 4/32: .*leave '3' out of the tie"
    with pytest.raises(rs.StudyError, match=told):
        opened(**of_four)
