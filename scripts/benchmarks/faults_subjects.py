"""A study that was run and exported, for its files to be damaged; and the ways by which they are read."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import faults_mutations as mutations
import torch
import torch.nn.functional as F
from faults_mutations import Mutation
from torch import nn

import ranksearch as rs
from ranksearch.cache import Cache, content_hash
from ranksearch.cli.reading import show_front, show_overview, show_plan, write_report
from ranksearch.compression import rebuild
from ranksearch.export import file_sha256, load
from ranksearch.factorisations import Factorisations
from ranksearch.folder_latency import time_folder
from ranksearch.home import StudyHome
from ranksearch.home_records import read_profile
from ranksearch.plan import LayerChoice, Plan
from ranksearch.spec import Goals
from ranksearch.study_export import export_plan
from ranksearch.verification import verify_folder

NAME, KEY, N_TRIALS = "faults", "entry", 4
TUCKER = LayerChoice(decomposition="tucker2", ranks=(6, 6))


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A file within a folder, how it may be changed, and what then reads it; `tell` the folder's hashes of it."""

    kind: str
    file: str
    mutations: tuple[Mutation, ...]
    read: Callable[[Path], None]
    sign: Callable[[Path], None] = lambda _folder: None


def network() -> nn.Sequential:
    """Two convolutions and a linear layer on (N, 3, 8, 8), always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def study() -> rs.StudySpec:
    """A study of it on random images, which is done in seconds."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(128, 3, 8, 8, generator=generator), torch.arange(128) % 4
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    data = rs.Data(calibration=batches[:2], validation=batches[2:3], test=batches[3:])
    return rs.StudySpec(
        name=NAME,
        model=network,
        data=lambda: data,
        loss=F.cross_entropy,
        score=rs.top1,
        target=rs.Target(batch_size=4, threads=1),
        goals=Goals(max_drop="100%"),
        space=rs.Space(decompositions=("none", "svd", "tucker2"), rank_multiple=4),
        recovery=rs.Recovery(steps=1),
    )


def write_subjects(folder: Path) -> None:
    """Runs the study into `home`, exports its best plan to `out`, and fills a `cache`."""
    rs.search(study(), trials=N_TRIALS, home=folder / "home", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    home = StudyHome(folder / "home" / NAME)
    choice: dict[str, Any] = {"goals": Goals(), "minimize": "size", "trial": None, "run_id": None, "storage": None}
    export_plan(home, folder / "out", **choice, force=True)
    (folder / "cache").mkdir()
    _factorisations(Cache(directory=folder / "cache")).factors("2", TUCKER)
    (entry,) = (folder / "cache").iterdir()
    entry.rename(folder / "cache" / KEY)


def subjects() -> list[Subject]:
    """Every kind of file that is read, with what reads it."""
    texts, tensors = (mutations.of_json, mutations.of_json, mutations.of_bytes), (mutations.of_safetensors,)
    out, home = "out", f"home/{NAME}"
    return [
        Subject(kind="plan", file=f"{out}/plan.json", mutations=texts, read=_read_plan),
        Subject(kind="plan", file=f"{out}/plan.json", mutations=texts, read=_load),
        Subject(kind="export", file=f"{out}/model.safetensors", mutations=tensors, read=_load, sign=_sign_weights),
        Subject(kind="export", file=f"{out}/example.safetensors", mutations=tensors, read=_verify, sign=_sign),
        Subject(kind="export", file=f"{out}/runtime.json", mutations=texts, read=_verify, sign=_sign_record),
        Subject(kind="export", file=f"{out}/runtime.json", mutations=texts, read=_time, sign=_sign_record),
        Subject(kind="export", file=f"{out}/plan.json", mutations=texts, read=_verify, sign=_sign),
        Subject(kind="cache", file=f"cache/{KEY}", mutations=(mutations.of_bytes,), read=_get),
        Subject(kind="cache", file=f"cache/{KEY}", mutations=(_of_entry,), read=_factor),
        Subject(kind="cache", file=f"{home}/candidates.json", mutations=texts, read=_read_table),
        *(
            Subject(kind="home", file=f"{home}/{file}", mutations=ways, read=read)
            for file, ways in (
                ("study.json", texts), ("candidates.json", texts), ("controls.json", texts), ("remeasured.json", texts),
                ("journal.log", (mutations.of_lines, mutations.of_bytes)),
            )
            for read in (_front, _show)
        ),
        Subject(kind="home", file=f"{home}/remeasured.json", mutations=texts, read=_report),
        Subject(kind="home", file=f"{home}/journal.log", mutations=(mutations.of_lines,), read=_export),
    ]  # fmt: skip


def _read_plan(folder: Path) -> None:
    plan = Plan.read(folder / "out" / "plan.json")
    assert Plan.from_json(plan.to_json()) == plan and plan.summary() and plan.hash()
    rebuild(_network(), plan)


def _load(folder: Path) -> None:
    load(folder / "out", _network())


def _verify(folder: Path) -> None:
    list(verify_folder(folder / "out"))


def _time(folder: Path) -> None:
    time_folder(folder / "out", max_seconds=0.001)


def _get(folder: Path) -> None:
    Cache(directory=folder / "cache").get(KEY)


def _factor(folder: Path) -> None:
    """Factors with a forged entry are those without."""

    @dataclass(frozen=True)
    class Forged:
        def get(self, _key: str) -> bytes | None:
            return Cache(directory=folder / "cache").get(KEY)

        def put(self, _key: str, _content: bytes) -> None:
            pass

    found = _factorisations(Forged()).factors("2", TUCKER)  # type: ignore[arg-type]
    assert [weight.shape for weight in found.weights] == [weight.shape for weight in _true_factors().weights]


def _read_table(folder: Path) -> None:
    profile = read_profile(StudyHome(folder / "home" / NAME))
    indices = [layer.dense for layer in profile.layers]
    profile.predict(indices), profile.tied_rows(), profile.plan(indices).hash()


def _front(folder: Path) -> None:
    show_front(None, NAME, home=folder / "home", storage=None, every=True, format="table")
    show_overview(folder / "home", None)


def _show(folder: Path) -> None:
    show_plan(None, NAME, 1, 2, home=folder / "home", storage=None)


def _report(folder: Path) -> None:
    write_report(None, NAME, folder / "report.html", home=folder / "home", storage=None)


def _export(folder: Path) -> None:
    choice: dict[str, Any] = {"goals": Goals(), "minimize": "latency", "trial": None, "run_id": None, "storage": None}
    export_plan(StudyHome(folder / "home" / NAME), folder / "again", **choice, force=True)


def _of_entry(content: bytes, rng: random.Random) -> bytes:
    """A cache entry of other tensors, its checksum right."""
    changed = mutations.of_safetensors(content[32:], rng)
    return hashlib.sha256(changed).digest() + changed


def _sign(folder: Path) -> None:
    """The record names the files as they are now."""
    path = folder / "out" / "runtime.json"
    record = json.loads(path.read_text())
    record["sha256"] = {name: file_sha256(folder / "out" / name) for name in record["sha256"]}
    _write_record(path, record)


def _sign_record(folder: Path) -> None:
    """The record's checksum is its own, where it is still a record."""
    path = folder / "out" / "runtime.json"
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(path.read_text())
        if isinstance(record, dict):
            _write_record(path, record)


def _sign_weights(folder: Path) -> None:
    path = folder / "out" / "plan.json"
    plan = Plan.read(path)
    assert plan.provenance is not None
    named = plan.provenance.model_copy(update={"sha256": file_sha256(folder / "out" / "model.safetensors")})
    path.write_text(plan.model_copy(update={"provenance": named}).to_json())


def _write_record(path: Path, record: dict[str, Any]) -> None:
    record.pop("checksum", None)
    path.write_text(json.dumps({**record, "checksum": content_hash(record)}))


@cache
def _network() -> nn.Module:
    return network()


def _factorisations(kept: Cache | None) -> Factorisations:
    return Factorisations(_network(), {}, kept)


@cache
def _true_factors() -> Any:
    return _factorisations(None).factors("2", TUCKER)
