"""A stranger's export folder is checked, or refused in a sentence: whatever lies in it, nothing crashes."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Commands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_study import SVD
from torch import nn

import ranksearch as rs
from ranksearch.cache import content_hash
from ranksearch.errors import RankSearchError, RuntimeUnavailableError, StudyError
from ranksearch.export import export_bundle, file_sha256, load, read_example, write_bundle
from ranksearch.export_record import read_record
from ranksearch.folder_latency import time_folder
from ranksearch.home import read_json
from ranksearch.plan import Plan, Provenance
from ranksearch.portable import write_portable
from ranksearch.runtimes import OnnxRuntime
from ranksearch.verification import Check, verify_folder
from ranksearch.workbench import Workbench

PORTABLE = ("portable.onnx", "portable.xml", "portable.pt2")
CLAIMED = {"latency_ms": 1.0, "latency_ratio": 0.5}


class Pair(nn.Module):
    """Two named inputs, two named outputs whose order is not that of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.first(tokens)) * mask
        return {"wide": hidden, "logits": self.second(hidden)}


@pytest.fixture(scope="module")
def exported(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model of several inputs and outputs, with all portable files."""
    torch.manual_seed(0)
    model, example = Pair().eval(), {"tokens": torch.randn(16, 12), "mask": torch.rand(16, 32)}
    plan, place = Plan(layers={"first": SVD}), tmp_path_factory.mktemp("strange")
    compressed = rs.compress(model, plan, calibration=[(example, None)]).eval()
    write_bundle(replace(bench, model=model, example=example), plan, compressed, place / "bundle")
    n_bytes = (place / "bundle" / "model.safetensors").stat().st_size

    def add(folder: Path) -> None:
        write_portable(load(folder, model), read_example(folder)[0], folder, ["onnx", "openvino", "pt2"])

    measured = {**CLAIMED, "model_bytes": n_bytes}
    export_bundle(
        place / "bundle", place / "out", measured, lambda _files: "# Report\n", Provenance(study="pair"), False, add
    )
    return place / "out"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _record: None) -> None:
    """Changes the record, and makes its checksum and its hashes those of the files as they are."""
    record = read_json(folder / "runtime.json")
    record["sha256"] = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "runtime.json"}
    change(record)
    record.pop("checksum", None)
    record["checksum"] = content_hash(record)
    (folder / "runtime.json").write_text(json.dumps(record))


def checks_of(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify_folder(folder, trusted=True)}


def test_portable_files_are_run_too(folder: Path) -> None:
    checks = checks_of(folder)
    assert all(checks[f"{name} gives the example's output"].holds for name in PORTABLE)
    assert [check.word for check in checks.values()] == ["holds"] * len(checks)


class Planted:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["portable.pt2", "model.pt2", "model.xml"])
def test_nothing_that_can_run_code_is_opened_untold(folder: Path, name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save(Planted(mark), folder / name)
    if name == "portable.pt2":
        rewrite(folder)
    else:
        rewrite(folder, lambda record: record.update(artefact=name, target={"runtime": "torch", "batch_size": 16}))
    check = {check.name: check for check in verify_folder(folder)}[f"{name} gives the example's output"]
    assert check.word == "skipped" and "--trust" in check.found
    with pytest.raises(StudyError, match="can run code as it is opened"):
        time_folder(folder, rs.Target(runtime="torch", batch_size=16))
    assert not mark.exists()


def test_what_is_not_installed_is_skipped_and_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_runtime: OnnxRuntime) -> None:
        raise RuntimeUnavailableError("runtime 'onnxruntime' needs onnx, which is not installed: pip install it")

    monkeypatch.setattr(OnnxRuntime, "check_installed", missing)
    check = checks_of(folder)["portable.onnx gives the example's output"]
    assert check.word == "skipped" and "pip install" in check.found


@pytest.mark.parametrize("name", PORTABLE)
def test_a_portable_file_of_another_model_fails_its_check_alone(folder: Path, name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    form = {"portable.onnx": "onnx", "portable.xml": "openvino", "portable.pt2": "pt2"}[name]
    write_portable(Pair().eval(), read_example(folder)[0], folder, [form])
    rewrite(folder)
    wrong = f"{name} gives the example's output"
    assert [check.name for check in checks_of(folder).values() if not check.holds] == [wrong]
    (folder / name).write_bytes(b"nonsense")
    rewrite(folder)
    check = checks_of(folder)[wrong]
    assert check.word == "FAILS" and "does not run on the example" in check.found


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no target": lambda record: record.pop("target"),
    "a target that is a list": lambda record: record.update(target=[]),
    "a target of other words": lambda record: record["target"].update(speed=9),
    "a target of wrong type": lambda record: record["target"].update(threads="two"),
    "no threads": lambda record: record["target"].update(threads=0),
    "unknown runtime": lambda record: record["target"].update(runtime="abacus"),
    "unknown device": lambda record: record["target"].update(device="\x00"),
    "cores that are not there": lambda record: record["target"].update(cores="9999"),
    "an artefact elsewhere": lambda record: record.update(artefact="../out/model.xml"),
    "an absolute artefact": lambda record: record.update(artefact="/etc/passwd"),
    "an artefact that is its plan": lambda record: record.update(artefact="plan.json"),
    "an artefact that is no name": lambda record: record.update(artefact=None),
    "a file elsewhere": lambda record: record["sha256"].update({"../model.xml": "0"}),
    "a file of no name": lambda record: record["sha256"].update({"": "0"}),
    "a file that cannot be printed": lambda record: record["sha256"].update({"a\ud800": "0"}),
    "a hash that is a number": lambda record: record["sha256"].update({"plan.json": 7}),
    "an unlisted artefact": lambda record: record["sha256"].pop("model.xml"),
    "no figures": lambda record: record.update(measured={}),
    "figures in words": lambda record: record.update(measured={"model_bytes": "few", "latency_ms": []}),
    "kernels that are a list": lambda record: record.update(kernels=["fast"]),
    "a fingerprint of numbers": lambda record: record.update(fingerprint={"isa": 3}),
}


def refused(folder: Path) -> str:
    """Why the folder is refused, by both commands: an error of ours, or a check that fails."""
    try:
        failed = [check for check in verify_folder(folder) if not check.holds]
    except RankSearchError as error:
        reason = str(error)
    else:
        assert failed
        reason = failed[0].found
    with pytest.raises(RankSearchError):
        time_folder(folder, max_seconds=0.01)
    assert reason and "\n" not in reason
    return reason


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_record_that_cannot_be_used_is_told(folder: Path, name: str) -> None:
    rewrite(folder, DAMAGE[name])
    refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"target": {}', b'{"a": ' + b"1" * 10_000 + b"}"]
)
@pytest.mark.parametrize("name", ["runtime.json", "plan.json"])
def test_a_text_that_is_no_json_is_told(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    if name == "plan.json":
        rewrite(folder)
        with pytest.raises(RankSearchError, match="plan"):
            list(verify_folder(folder))
    else:
        assert "is no export folder" in refused(folder)


EXAMPLES: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None]] = {
    "empty": ({}, {"inputs": "mapping"}),
    "no metadata": ({"input.tokens": torch.zeros(16, 12)}, None),
    "unknown kind": ({"input.tokens": torch.zeros(16, 12)}, {"inputs": "set"}),
    "a tensor without its name": ({"input.tokens": torch.zeros(16, 12)}, {"inputs": "tensor"}),
    "an input too few": ({"input.tokens": torch.zeros(16, 12), "output.wide": torch.zeros(1)}, {"inputs": "mapping"}),
    "another type": (
        {"input.tokens": torch.zeros(16, 12, dtype=torch.bfloat16), "input.mask": torch.zeros(16, 32)},
        {"inputs": "mapping"},
    ),
    "another shape": ({"input.tokens": torch.zeros(3), "input.mask": torch.zeros(16, 32)}, {"inputs": "mapping"}),
    "no outputs": ({"input.tokens": torch.zeros(16, 12), "input.mask": torch.zeros(16, 32)}, {"inputs": "mapping"}),
}


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_that_does_not_fit_is_told(folder: Path, name: str) -> None:
    tensors, metadata = EXAMPLES[name]
    save_file(tensors, folder / "example.safetensors", metadata=metadata)
    rewrite(folder)
    with suppress(RankSearchError):
        assert not all(check.holds for check in verify_folder(folder))
    with suppress(RankSearchError):
        assert not time_folder(folder, max_seconds=0.01).is_right


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "example.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 64])
def test_a_file_of_another_kind_is_told(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    rewrite(folder)
    with suppress(RankSearchError):
        assert not all(check.holds for check in verify_folder(folder))
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in " ".join(check.name for check in verify_folder(folder) if not check.holds)
    with pytest.raises(StudyError, match=name):
        time_folder(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["target", "fingerprint", "artefact", "kernels", "measured", "sha256"]), data=st.data())
def test_no_record_crashes(folder: Path, key: str, data: st.DataObject) -> None:
    record = read_json(folder / "runtime.json")
    path = [key]
    while isinstance(inner := _at(record, path), dict) and inner and data.draw(st.booleans()):
        path.append(data.draw(st.sampled_from(sorted(inner))))
    _at(record, path[:-1])[path[-1]] = data.draw(JSON)
    strange = folder.parent / "strange"
    shutil.rmtree(strange, ignore_errors=True)
    strange.mkdir()
    (strange / "runtime.json").write_text(json.dumps(record))
    with suppress(RankSearchError):
        read_record(strange)
    # Without its files no folder holds.
    with suppress(RankSearchError):
        assert not all(check.holds for check in verify_folder(strange))


def _at(record: Any, path: list[str]) -> Any:
    for key in path:
        record = record[key]
    return record


def test_the_commands_say_so_in_a_line(folder: Path, commands: Commands) -> None:
    rewrite(folder, DAMAGE["an artefact elsewhere"])
    ended = commands.run(folder, "verify", folder)
    assert ended.code == 1 and "FAILS" in ended.out and "'../out/model.xml'" in ended.out, ended.err
    ended = commands.run(folder, "bench", folder)
    assert ended.code == 2 and ended.err.startswith("error: ") and "'../out/model.xml'" in ended.err
