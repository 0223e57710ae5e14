"""What a stranger wrote can at worst be refused, and what only its owner may know is never shown."""

import hashlib
import json
import os
import random
import resource
import shlex
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic_study import make_profile
from tiny_study import SVD, network

import ranksearch as rs
from ranksearch.cache import Cache
from ranksearch.candidates import Profile
from ranksearch.cli import terminal
from ranksearch.cli.options import typed
from ranksearch.compression import rebuild
from ranksearch.errors import PlanError, RankSearchError, StudyError
from ranksearch.export import file_sha256
from ranksearch.export_record import read_record
from ranksearch.factorisations import Factorisations
from ranksearch.figures import figure_html, layers_figure, pareto_figure
from ranksearch.home import StudyHome, artefact_of, write_json
from ranksearch.home_records import control_records, figures_again, full_records, read_profile, study_record
from ranksearch.masking import masked, public_address
from ranksearch.optimization import check_storage, coordinator_lock, read_study
from ranksearch.plan import LayerChoice, Plan, Provenance
from ranksearch.reading import printable
from ranksearch.reports.document import Bullets, Code, Heading, Paragraph, Table, to_html, to_markdown
from ranksearch.staircase import Staircase
from ranksearch.tracking import find_study, page_url, pages
from ranksearch.tracking.store import explained, failure_text

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))
import faults_fuzz
import faults_mutations as mutations

SECRET = "p@ss/w0rd"
STORAGE = f"postgresql://me:{SECRET}@host/studies"
SERVER = "https://me:p%40ss%2Fw0rd@127.0.0.1:9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://***@host/db"),
        ("cannot open 'mysql://me:p/w@x@host/db?charset=utf8'", "cannot open 'mysql://***@host/db?charset=utf8'"),
        ("https://token@host, then http://host/a", "https://***@host, then http://host/a"),
        (
            "postgresql://host/db?user=me&password=pw&sslmode=off",
            "postgresql://host/db?user=me&password=***&sslmode=off",
        ),
        ("https://host/x?api_token=t'", "https://host/x?api_token=***'"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("mail me@host about a plan", "mail me@host about a plan"),
    ],
)
def test_passwords_are_masked_wherever_an_address_stands(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_a_storage_that_cannot_be_opened_is_named_without_its_password() -> None:
    with pytest.raises(StudyError, match="cannot open the Optuna storage") as caught:
        check_storage(STORAGE.replace("postgresql", "nodialect"))
    assert "host/studies" in str(caught.value) and "w0rd" not in str(caught.value)


def test_a_tracking_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with pytest.raises(StudyError, match="127.0.0.1:9") as caught:
        find_study(SERVER, None, "digits")
    assert "w0rd" not in str(caught.value)
    assert caught.value.__cause__ is None or "w0rd" not in str(caught.value.__cause__)


def test_no_traceback_and_no_log_tells_what_mlflow_says_of_an_address() -> None:
    failure = OSError(f"API request to {SERVER}/api/2.0/mlflow failed")
    with pytest.raises(StudyError) as caught, explained(SERVER):
        raise failure
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert failure_text(failure) == "API request to https://***@127.0.0.1:9/api/2.0/mlflow failed"


def test_the_page_of_a_server_is_opened_without_who_logs_in() -> None:
    assert public_address(SERVER) == "https://127.0.0.1:9"
    assert page_url(SERVER, "1", "r").startswith("https://127.0.0.1:9/#/experiments/1")


def test_commands_to_copy_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    words = shlex.split(typed(study="digits", storage=STORAGE))
    assert words == ["--study", "digits", "--storage", "postgresql://***@host/studies"]
    monkeypatch.setenv("OPTUNA_STORAGE", STORAGE)
    assert typed(storage=STORAGE) == ""


def test_the_store_of_the_ui_stands_in_no_list_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = {}

    def popen(command: list[str], **options: object) -> None:
        started.update(options, command=command)

    monkeypatch.setattr(pages.subprocess, "Popen", popen)
    pages._start(STORAGE, 5000, None)
    assert SECRET not in " ".join(started["command"])
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == STORAGE
    assert started["command"][started["command"].index("--host") + 1] == "127.0.0.1"


def deep(n: int) -> str:
    return '{"schema": 1, "layers": ' + "[" * n + "]" * n + "}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (deep(300), "layers|recursion"),
        (deep(100_000), "nested too deeply"),
        ('{"schema": 1, "layers": {}, "layers": {"a": {}}}', "key 'layers' twice"),
        ('{"schema": 1, "layers": {"a": {"ranks": [1e400]}}}', "layers.a.ranks"),
        ('{"schema": 1, "layers": {"a": {"ranks": [NaN]}}}', "plan"),
        ('{"schema": 1, "layers": {"a": {"ranks": [1' + "0" * 5000 + "]}}}", "plan"),
        ('{"schema": 1, "layers": {"' + "a" * 100_000 + '": 1}}', r"layers\.aaa"),
        ('{"schema": 1, "layers": {"a": {"decomposition": ["' + "x" * 100_000 + '"]}}}', "valid string"),
    ],
    ids=["deep", "deeper", "twice", "beyond floats", "NaN", "beyond integers", "long name", "long value"],
)
def test_a_plan_of_another_kind_is_refused_in_a_short_sentence(text: str, told: str) -> None:
    with pytest.raises(PlanError, match=told) as caught:
        Plan.from_json(text)
    assert len(str(caught.value)) < 1000


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(min_value=0))
def test_no_plan_crashes(seed: int) -> None:
    rng, plan = random.Random(seed), Plan(layers={"0": SVD, "3": SVD})
    mutate = rng.choice((mutations.of_json, mutations.of_bytes))
    with suppress(PlanError):
        read = Plan.from_json(mutate(plan.to_json().encode(), rng).decode(errors="replace"))
        assert Plan.from_json(read.to_json()) == read
        rebuild(network(), read)


@pytest.mark.parametrize("rank", [0, -1, 10**12, 10**18])
def test_a_rank_that_would_take_all_memory_is_refused(rank: int) -> None:
    plan = Plan(layers={"3": LayerChoice(decomposition="tucker2", ranks=(rank, 4))})
    with pytest.raises(PlanError, match="not all between 1 and"):
        rebuild(network(), plan)


def test_gigabytes_of_text_take_no_memory(tmp_path: Path) -> None:
    names = ("plan.json", "study.json", "candidates.json", "runtime.json", "journal.log")
    for name in names:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    home = StudyHome(tmp_path)
    readers = (lambda: Plan.read(tmp_path / names[0]), lambda: study_record(home), lambda: read_profile(home),
               lambda: read_record(tmp_path), lambda: read_study(tmp_path, "tiny"))  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read, name in zip(readers, names, strict=True):
        with pytest.raises(RankSearchError, match=f"{name}.*(larger|longer) than"):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan and its weights in a folder."""
    plan = Plan(layers={"3": SVD})
    rs.save(rs.compress(network(), plan), plan, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "anything"])
def test_a_link_out_of_a_folder_is_refused(saved: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("{}")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(tmp_path / "outside")
    with pytest.raises(PlanError, match=rf"{name} is a link out of its folder.*cp -rL"):
        rs.load(saved, network())


def test_links_within_a_folder_are_its_own(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "blob")
    (saved / "model.safetensors").symlink_to("blob")
    rs.load(saved, network())


def test_a_pipe_is_never_waited_for(saved: Path) -> None:
    (saved / "plan.json").unlink()
    os.mkfifo(saved / "plan.json")
    with pytest.raises(PlanError, match=r"plan\.json is a pipe"):
        rs.load(saved, network())


def test_weights_of_a_much_larger_model_are_not_read(saved: Path) -> None:
    plan = Plan.read(saved / "plan.json")
    save_file({"large": torch.zeros(1 << 20)}, saved / "model.safetensors")
    named = plan.model_copy(update={"provenance": Provenance(sha256=file_sha256(saved / "model.safetensors"))})
    (saved / "plan.json").write_text(named.to_json())
    with pytest.raises(PlanError, match=r"model\.safetensors has 4,194,\d+ bytes, and"):
        rs.load(saved, network())


@pytest.mark.parametrize("name", ["../model.xml", "/etc/passwd", "a/b", "", "..", 7, ["model.xml"], "a\x1b[2J"])
def test_an_artefact_is_a_file_of_its_folder(name: object, tmp_path: Path) -> None:
    (tmp_path / "runtime.json").write_text(json.dumps({"artefact": name}))
    with pytest.raises(StudyError, match="none of its folder's") as caught:
        artefact_of(tmp_path)
    assert str(caught.value).isprintable()


def test_a_cache_reads_files_of_its_own_alone(tmp_path: Path) -> None:
    cache = Cache(directory=tmp_path / "cache", max_bytes=1000)
    cache.put("entry", b"x")
    (tmp_path / "cache" / "entry").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "cache" / "pipe")
    large = bytes(2000)
    (tmp_path / "cache" / "large").write_bytes(hashlib.sha256(large).digest() + large)
    assert [cache.get(key) for key in ("link", "pipe", "large")] == [None] * 3


FORGED = [
    b"",
    b"\xff" * 64,
    safetensors.torch.save({}),
    safetensors.torch.save({"factor0": torch.zeros(1), "factor1": torch.zeros(1)}),
    safetensors.torch.save({"factor0": torch.zeros(4, 144, 1, 1), "other": torch.zeros(1)}),
    struct.pack("<Q", 2**63) + b"{}",
]


@pytest.mark.parametrize("content", FORGED, ids=range(len(FORGED)))
def test_a_forged_entry_of_factors_is_made_again(content: bytes, tmp_path: Path) -> None:
    cache, model = Cache(directory=tmp_path), network()
    wanted = Factorisations(model, {}, cache).factors("3", SVD).weights
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    cache.put(entry.name, content)
    again = Factorisations(model, {}, cache).factors("3", SVD).weights
    assert all(torch.equal(one, other) for one, other in zip(again, wanted, strict=True))
    assert entry.read_bytes() == whole


def test_a_forged_staircase_is_told() -> None:
    for text in ("[]]", "{}", '["a"]', "[[1, 2]]", "[" * 100_000):
        with pytest.raises(ValueError, match="validation error"):
            Staircase.from_json(text)


STUDY = {
    "name": "tiny", "objectives": ["drop", "latency", "bytes"], "dense_accuracy": 0.9, "dense_latency_ms": 1.0,
    "dense_bytes": 1000, "noise_floor": 0.01, "target": {"runtime": "openvino"}, "fingerprint": {"isa": "avx2"},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3}, {"objectives": "drop"}, {"objectives": ["colour", "drop"]}, {"dense_accuracy": None},
        {"dense_latency_ms": 0}, {"dense_bytes": 10**400}, {"dense_latency_ms": float("inf")}, {"target": []},
        {"target": {"colour": "red"}}, {"target": {"batch_size": 0}}, {"fingerprint": {"isa": 3}}, {"skipped": ["x"]},
        {"model": {"name": "x"}}, {"data": 3}, {"seed": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_a_studys_record_of_another_shape_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    home = StudyHome(tmp_path)
    write_json(home.study, STUDY)
    assert study_record(home)["target"]["batch_size"] == 1
    write_json(home.study, STUDY | change)
    with pytest.raises(StudyError, match=r"study\.json is damaged"):
        study_record(home)


ROW = {
    "origin": "control: x",
    "summary": "x",
    "latency_ms": 1.0,
    "latency_ratio": 1.0,
    "model_bytes": 9,
    "bytes_ratio": 1,
}


def test_rows_and_figures_of_another_shape_are_refused(tmp_path: Path) -> None:
    home = StudyHome(tmp_path)
    assert (figures_again(home), control_records(home), full_records(home)) == ({}, [], [])
    write_json(home.controls, {"controls": [ROW, {"origin": "control: y", "summary": "y: unavailable"}]})
    write_json(home.remeasured, {"a": {"latency_ratio": 0.5, "test_accuracy": float("nan")}})
    assert len(control_records(home)) == 2 and len(figures_again(home)) == 1
    for damage in ([], [3], [ROW | {"latency_ratio": 0}], [ROW | {"model_bytes": None}], [ROW | {"accuracy": "x"}]):
        write_json(home.controls, {"controls": damage or "none"})
        with pytest.raises(StudyError, match=r"controls\.json is damaged"):
            control_records(home)
    for figures in (3, {"latency_ratio": None}, {"latency_ratio": -1}, {"test_accuracy": []}, {"accuracy": 10**400}):
        write_json(home.remeasured, {"a": figures})
        with pytest.raises(StudyError, match=r"remeasured\.json is damaged"):
            figures_again(home)


def test_a_candidate_table_that_cannot_be_computed_with_is_refused() -> None:
    whole = make_profile()
    text = whole.to_json()
    assert Profile.from_json(text) == whole
    name = whole.layers[0].name
    for old, new in (
        ('"dense_bytes": ', '"dense_bytes": -'),
        ('"loss": ', '"loss": 1e300, "loss": 1e300'),
        ('"loss": ', '"loss": NaN, "was": '),
        (f'"name": "{whole.layers[1].name}"', f'"name": "{name}"'),
        ('"ties": []', '"ties": [["nowhere"]]'),
    ):
        assert old in text
        with pytest.raises(StudyError, match="is damaged"):
            Profile.from_json(text.replace(old, new, 1))


def test_no_lock_and_no_journal_is_written_through_a_link(tmp_path: Path) -> None:
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.write_text("mine\nstill mine")
    home.mkdir()
    (home / "coordinator.lock").symlink_to(outside)
    with pytest.raises(StudyError, match=r"coordinator\.lock cannot be locked"), coordinator_lock(home):
        pass
    (home / "coordinator.lock").unlink()
    (home / "journal.log").symlink_to(outside)
    with pytest.raises(StudyError, match=r"journal\.log.*link out of its folder"):
        read_study(home, "tiny")
    assert outside.read_text() == "mine\nstill mine"


@pytest.mark.parametrize(
    "tail", ["null\n", "[]\n", '{"op_code": 99}\n', '{"op_code": 4, "worker_id": []}\n', "{}\n{}\n"]
)
def test_a_journal_of_other_lines_is_told(tail: str, tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text(tail)
    with pytest.raises(StudyError, match=r"journal\.log is damaged"):
        read_study(tmp_path, "tiny")


HOSTILE = "<script>alert(1)</script>"


def test_names_of_a_stranger_are_text_in_every_picture() -> None:
    row = {
        "trial": 1,
        "summary": HOSTILE,
        "origin": HOSTILE,
        "accuracy_drop": 0.1,
        "latency_ratio": 0.5,
        "model_bytes": 9,
    }
    layer = {"layer": HOSTILE, "choice": HOSTILE, "decomposition": HOSTILE, "why": HOSTILE, "ms": 1.0, "bytes": 9}
    for figure in (pareto_figure([row], HOSTILE), layers_figure([layer], HOSTILE)):
        # In the page, and in the little HTML that plotly draws.
        assert HOSTILE not in figure_html(figure, False) and HOSTILE not in str(figure.to_dict())


def test_names_of_a_stranger_are_text_in_every_document() -> None:
    blocks = [Heading(HOSTILE), Paragraph(f"**{HOSTILE}**"), Bullets((HOSTILE,)), Table((HOSTILE,), ((HOSTILE,),))]
    assert "<script" not in to_html([*blocks, Code(HOSTILE)], HOSTILE)
    assert "<script" not in to_markdown(blocks)
    assert "`<kernel>`" in to_markdown([Paragraph("runs `<kernel>`")])


def test_a_terminal_is_told_nothing_by_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b]0;title\x07\tb\n\x9bc é") == "a\ufffd]0;title\ufffd\tb\n\ufffdc é"
    terminal.print_table(["layer"], [["\x1b[2Jconv"]])
    terminal.say("\x1b[2Jtrial")
    assert "\x1b" not in capsys.readouterr().out


def test_the_fuzzer_notes_what_is_written_elsewhere(tmp_path: Path) -> None:
    """In a process of its own: what listens to one listens to its end."""
    case, log = tmp_path / "case", tmp_path / "log"
    case.mkdir()

    def work() -> None:
        written: list[str] = []
        faults_fuzz._watch_writes(case, log, written)
        (case / "inside").write_text("x")
        (case / "inside").unlink()
        assert not written
        (tmp_path / "outside").write_text("x")
        (tmp_path / "outside").rename(case / "inside")
        assert [line.split()[0] for line in written] == ["open", "os.rename"]

    assert faults_fuzz._in_a_process(work, tmp_path) == 0


def test_the_fuzzers_files_are_other_files() -> None:
    rng = random.Random(0)
    text = Plan(layers={"0": SVD}).to_json().encode()
    tensors = safetensors.torch.save({"a": torch.zeros(3)})
    for whole, mutate in ((text, mutations.of_json), (text, mutations.of_bytes), (tensors, mutations.of_safetensors)):
        changed = {mutate(whole, rng) for _ in range(100)}
        assert len(changed - {whole}) > 30
