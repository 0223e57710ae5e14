"""Saved models come back to the bit; an export folder does what it claims, and damage to it is told."""

import json
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import INT8, Pairs, plans
from torch import Tensor, nn

from ranksearch.cache import content_hash
from ranksearch.compression import compress
from ranksearch.controls import control_plans
from ranksearch.errors import PlanError, StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import (
    export_bundle,
    file_sha256,
    load,
    named_values,
    read_example,
    save,
    sweep,
    write_bundle,
    written_aside,
)
from ranksearch.factorisations import Factorisations
from ranksearch.home import read_json
from ranksearch.ladder import Evaluator
from ranksearch.plan import Plan, Provenance
from ranksearch.remeasure import Judge
from ranksearch.verification import Check, verify_folder, verify_measured, verify_rebuilt
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench

STUDY = """
import sys
sys.path.insert(0, {tests!r})
import torch
from tiny_study import make_spec, network, split
torch.manual_seed(0)
study = make_spec(network().eval(), split())
"""


def compressed(bench: Workbench, factorisations: Factorisations, plan: Plan) -> nn.Module:
    return compress(
        bench.model,
        plan,
        calibration=bench.calibration,
        factorisations=factorisations,
        weight_limit=bench.weight_limit,
    ).eval()


@pytest.mark.parametrize("kind", list(plans()))
def test_what_is_saved_is_loaded_to_the_bit(
    kind: str, bench: Workbench, factorisations: Factorisations, parts: dict[str, Pairs], tmp_path: Path
) -> None:
    model = compressed(bench, factorisations, plans()[kind])
    inputs, targets = parts["validation"][0]
    before = model(inputs)
    written = save(model, plans()[kind], tmp_path)
    assert torch.equal(model(inputs), before)
    loaded = load(tmp_path, bench.model)
    assert torch.equal(loaded(inputs), before)
    assert Plan.read(tmp_path / "plan.json") == written
    assert (tmp_path / "model.safetensors").stat().st_size == packed_bytes(model) == packed_bytes(loaded)
    loaded.train()
    bench.spec.loss(loaded(inputs), targets).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_eight_bits_take_a_quarter_of_the_weights(
    bench: Workbench, factorisations: Factorisations, tmp_path: Path
) -> None:
    written = save(compressed(bench, factorisations, plans()["8 bits"]), plans()["8 bits"], tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.45 * bench.dense.model_bytes
    assert [q.where for q in written.quantizers] == ["0.activation", "3.activation", "8.activation", "10.activation"]
    assert all(q.low <= 0 < q.high for q in written.quantizers)


def test_a_model_of_ones_own_training_is_calibrated_again_and_read_again(
    bench: Workbench, factorisations: Factorisations, parts: dict[str, Pairs], tmp_path: Path
) -> None:
    plan = plans()["mixed"]
    save(compressed(bench, factorisations, plan), plan, tmp_path)
    model = load(tmp_path, bench.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for inputs, targets in parts["train"]:
        optimizer.zero_grad()
        bench.spec.loss(model(3 * inputs), targets).backward()  # brighter images than the ranges were made for
        optimizer.step()
    model.eval()
    before = {quantizer.where: quantizer.high for quantizer in Plan.read(tmp_path / "plan.json").quantizers}
    brighter = [(3 * inputs, targets) for inputs, targets in parts["train"]]
    written = save(model, plan, tmp_path / "again", calibration=brighter)
    assert all(quantizer.high > before[quantizer.where] for quantizer in written.quantizers if quantizer.low == 0.0)
    inputs = 3 * parts["validation"][0][0]
    assert torch.equal(load(tmp_path / "again", bench.model)(inputs), model(inputs))
    with torch.no_grad():
        model[8][0].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="tensor '8.0.weight' holds NaN or infinity"):
        save(model, plan, tmp_path / "never", calibration=brighter)


def test_what_does_not_fit_or_is_damaged_is_refused(
    bench: Workbench, factorisations: Factorisations, tmp_path: Path
) -> None:
    model = compressed(bench, factorisations, plans()["mixed"])
    save(model, plans()["mixed"], tmp_path)
    with pytest.raises(PlanError, match="the model has no layer '10'"):
        load(tmp_path, bench.model[:9])
    with pytest.raises(PlanError, match="layer '8', Linear"):
        load(tmp_path, nn.Sequential(*bench.model[:8], nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 10)))
    weights = tmp_path / "model.safetensors"
    flip(weights)
    with pytest.raises(PlanError, match="is not the file that plan.json names by its SHA-256"):
        load(tmp_path, bench.model)
    weights.unlink()
    with pytest.raises(PlanError, match="is missing; export the plan again"):
        load(tmp_path, bench.model)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(PlanError, match="cannot read the plan file"):
        load(tmp_path, bench.model)


def test_weights_of_another_plan_are_refused(bench: Workbench, factorisations: Factorisations, tmp_path: Path) -> None:
    save(compressed(bench, factorisations, plans()["float"]), plans()["float"], tmp_path)
    (tmp_path / "plan.json").write_text(Plan(layers={"10": INT8}).to_json())
    with pytest.raises(PlanError):
        load(tmp_path, bench.model)


@pytest.fixture(scope="module")
def exported(
    bench: Workbench, factorisations: Factorisations, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """Exports an evaluated plan of both kinds of layers into a folder, as often as wanted."""
    place = tmp_path_factory.mktemp("plans") / "bundle"
    plan = plans()["mixed"]
    evaluation = Evaluator(
        bench=bench,
        factorisations=factorisations,
        dense_latency_ms=1.0,
        max_latency_seconds=0.2,
        keep=lambda plan, model: write_bundle(bench, plan, model, place),
    ).evaluate(plan)
    measured = dict.fromkeys(FRONT_COLUMNS) | {k: v for k, v in evaluation if k in FRONT_COLUMNS}
    # What so small a model takes differs from one second to the next: whether a latency holds is told by claims.
    measured |= {"dense_latency_ms": 1.0, "ratio_high": 10.0}

    def export(destination: Path, **changes: Any) -> Path:
        export_bundle(place, destination, measured | changes, told, Provenance(study="tiny", trial=7), False)
        return destination

    return export


def told(files: Mapping[str, int]) -> str:
    """A report of the files' names."""
    return f"# Report\n\n{', '.join(files)}\n"


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.holds]


def verified(folder: Path, bench: Workbench) -> list[Check]:
    return [*verify_folder(folder), *verify_rebuilt(folder, bench), *verify_measured(folder, bench, 0.2)]


def flip(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(bytes(data))


def test_an_export_holds_all_that_it_claims(exported: Any, bench: Workbench, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "plan.json", "model.safetensors", "runtime.json", "example.safetensors", "report.md", "load_example.py",
        "model.xml", "model.bin",
    }  # fmt: skip
    checks = verified(folder, bench)
    assert failed(checks) == []
    assert {check.name for check in checks} >= {
        "size is as claimed",
        "kernels are those that were timed",
        "the artefact gives the example's output",
        "rebuilt in torch it gives the example's output",
        "the drop on validation data is within the claimed interval",
        "the latency is as claimed",
    }
    provenance = Plan.read(folder / "plan.json").provenance
    assert provenance is not None and (provenance.study, provenance.trial) == ("tiny", 7)
    assert provenance.sha256 is not None and "torch" in provenance.versions
    record = read_json(folder / "runtime.json")
    assert record["options"]["INFERENCE_NUM_THREADS"] == 2 and record["measured"]["model_bytes"] > 0
    assert any("I8" in kernel for kernel in record["kernels"])


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.xml", "example.safetensors", "report.md"])
def test_a_flipped_byte_fails_the_check_of_its_file_alone(
    name: str, exported: Any, bench: Workbench, tmp_path: Path
) -> None:
    folder = exported(tmp_path / "out")
    flip(folder / name)
    assert failed(verified(folder, bench)) == [f"{name} is unchanged"]
    (folder / name).unlink()
    assert failed(verified(folder, bench)) == [f"{name} is unchanged"]


def claim(folder: Path, **changes: Any) -> None:
    """Rewrites the figures that the folder claims, and its checksum with them."""
    record = read_json(folder / "runtime.json")
    record["measured"] |= changes
    rewrite(folder, record)


def claim_file(folder: Path, name: str) -> None:
    """Rewrites the folder's record to hold the file as it is now."""
    record = read_json(folder / "runtime.json")
    record["sha256"][name] = file_sha256(folder / name)
    rewrite(folder, record)


def rewrite(folder: Path, record: dict[str, Any]) -> None:
    del record["checksum"]
    record["checksum"] = content_hash(record)
    (folder / "runtime.json").write_text(json.dumps(record))


def test_a_changed_record_is_told(exported: Any, bench: Workbench, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    text = (folder / "runtime.json").read_text()
    size = read_json(folder / "runtime.json")["measured"]["model_bytes"]
    (folder / "runtime.json").write_text(text.replace(f'"model_bytes": {size}', f'"model_bytes": {size - 1}'))
    assert failed(verified(folder, bench)) == ["runtime.json is unchanged"]


@pytest.mark.parametrize(
    ("claims", "check"),
    [
        ({"model_bytes": 1000}, "size is as claimed"),
        ({"ratio_high": 0.001, "latency_ratio": 0.001}, "the latency is as claimed"),
        (
            {"accuracy_drop": -0.5, "drop_low": -0.6, "drop_high": -0.4},
            "the drop on validation data is within the claimed interval",
        ),
        ({"accuracy_drop": -0.5, "drop_high": None}, "the drop on validation data is within the claimed interval"),
    ],
)
def test_a_false_claim_fails_its_check_alone(
    claims: dict[str, Any], check: str, exported: Any, bench: Workbench, tmp_path: Path
) -> None:
    folder = exported(tmp_path / "out")
    claim(folder, **claims)
    assert failed(verified(folder, bench)) == [check]


@pytest.mark.parametrize(("n_disturbed", "holds"), [(0, True), (1, True), (2, True), (3, False)])
def test_a_latency_is_false_only_where_it_fails_each_time(
    n_disturbed: int, holds: bool, exported: Any, bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path / "out")
    claim(folder, ratio_high=10.0)
    disturbed = iter([True] * n_disturbed)
    measured = Judge.latency

    def latency(judge: Judge, *given: Any) -> dict[str, Any]:
        slower = 1000.0 if next(disturbed, False) else 1.0
        return {name: slower * figure for name, figure in measured(judge, *given).items()}

    monkeypatch.setattr(Judge, "latency", latency)
    check = list(verify_measured(folder, bench, 0.1))[-1]
    assert check.name == "the latency is as claimed" and check.holds == holds
    assert ("measured" in check.found) == (n_disturbed > 0)


def test_another_model_another_target_and_no_folder(exported: Any, bench: Workbench, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    other = replace(bench, model=nn.Sequential(*bench.model[:10]))
    assert failed(list(verify_rebuilt(folder, other))) == ["rebuilds from plan and weights"]
    batch_of_one = replace(bench, spec=replace(bench.spec, target=replace(bench.spec.target, batch_size=1)))
    assert failed(list(verify_measured(folder, batch_of_one))) == ["the study's target is the folder's"]
    with pytest.raises(StudyError, match="is no export folder: runtime.json is missing"):
        list(verify_folder(tmp_path / "nowhere"))


def test_outputs_that_are_not_numbers_do_not_pass(exported: Any, bench: Workbench, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    model = load(folder, bench.model)
    with torch.no_grad():
        model.get_parameter("10.bias").fill_(float("nan"))
    save(model, Plan.read(folder / "plan.json"), folder)
    for name in ("plan.json", "model.safetensors"):
        claim_file(folder, name)
    assert failed(list(verify_rebuilt(folder, bench))) == ["rebuilt in torch it gives the example's output"]


def test_nothing_is_overwritten_but_an_earlier_export(exported: Any, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    with pytest.raises(StudyError, match="exists and is not empty; choose another folder, or pass --force"):
        exported(folder)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("plan.json", "runtime.json"):
        (bundle / name).write_bytes((folder / name).read_bytes())

    def export(destination: Path, force: bool = True) -> None:
        export_bundle(bundle, destination, {}, told, Provenance(), force)

    export(folder)
    assert not (folder / "model.bin").exists()  # the earlier export is replaced as a whole
    mine = tmp_path / "mine"
    mine.mkdir()
    export(mine)
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(StudyError, match="is no earlier export, so --force does not replace it"):
        export(thesis.parent)
    with pytest.raises(StudyError, match="is a file; choose a folder"):
        export(thesis)
    assert thesis.read_text() == "years of work"
    with pytest.raises(StudyError, match="the weights of this plan are gone"):
        export_bundle(tmp_path / "gone", tmp_path / "new", {}, told, Provenance(), False)


def test_a_folder_is_whole_or_as_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with written_aside(folder) as aside:
        (aside / "a").write_text("first")
    with pytest.raises(RuntimeError, match="half way"), written_aside(folder) as aside:
        (aside / "a").write_text("second")
        raise RuntimeError("half way")
    assert (folder / "a").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


def test_the_example_that_comes_along_runs(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "out")
    script = tmp_path / "study.py"
    script.write_text(STUDY.format(tests=str(Path(__file__).parent)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["load_example.py", str(script)])
    runpy.run_path(str(folder / "load_example.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split(":")[1]) < 1.0


class ByName(nn.Module):
    """Two inputs by name, two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"sum": self.first(left) + self.second(right), "product": self.first(left) * self.second(right)}


class ByPlace(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(left), self.layer(right)


@pytest.mark.parametrize("kind", ["mapping", "tuple"])
def test_examples_of_several_inputs(kind: str, bench: Workbench, tmp_path: Path) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(16, 6), torch.randn(16, 6)
    model: nn.Module = ByName().eval() if kind == "mapping" else ByPlace().eval()
    example: Any = {"left": left, "right": right} if kind == "mapping" else (left, right)
    several = replace(bench, model=model, example=example)
    write_bundle(several, Plan(layers={}), model, tmp_path / "bundle")
    inputs, expected = read_example(tmp_path / "bundle")
    assert type(inputs) is type(example)
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    assert all(torch.equal(tensor, example[key]) for key, tensor in pairs)
    outputs = named_values(model(**inputs) if kind == "mapping" else model(*inputs))
    assert outputs.keys() == expected.keys()
    assert all(torch.allclose(outputs[name], expected[name], atol=1e-4) for name in expected)


def test_dense_can_be_exported(bench: Workbench, tmp_path: Path) -> None:
    (_, dense), *_ = control_plans(bench)
    write_bundle(bench, dense, bench.model, tmp_path / "dense")
    assert torch.equal(load(tmp_path / "dense", bench.model)(bench.example), bench.model(bench.example))


def test_what_a_killed_process_left_aside_is_swept_and_what_it_had_moved_comes_back(tmp_path: Path) -> None:
    for name in ("whole", ".whole.0123.old", ".half.0123.new", ".moved.4567.old", ".moved.4567.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "whole": "whole", "moved": ".moved.4567.old",
    }  # fmt: skip
    sweep(tmp_path / "nowhere")
