"""Architectures: whether each kind of network goes the whole way, from its layers to an export that is verified.

A row holds when a plan that mixes decompositions with 8 and 4 bits, chosen from the measured table of candidates,
gives torch's own outputs on OpenVINO and on the torch runtime, is read again to the bit, and its export folder, with
ONNX, OpenVINO and pt2 files of any batch, does what it claims.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models_networks import NETWORKS, network
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.compression import compress
from ranksearch.controls import control_plans
from ranksearch.export import export_bundle, load, write_bundle
from ranksearch.export_record import relative_to
from ranksearch.layers import call_model, evaluating
from ranksearch.plan import Plan, Provenance
from ranksearch.portable import FORMATS, TOLERANCE, write_portable
from ranksearch.runtimes import get_runtime
from ranksearch.session import dense_latency, make_profile
from ranksearch.trees import tensors
from ranksearch.verification import verify_folder
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench, open_workbench, to_arrays

BATCH_SIZE, N_BATCHES = 4, 4
QUICK = ("audio",)
# Two implementations of float32 sums, through a whole network.
FLOAT_TOLERANCE = 1e-3
UNTESTED = ("timm", "torchvision")

# What a layer may be asked to become, one after the other along the model.
WISHES: Sequence[Callable[[Candidate], bool]] = (
    lambda c: c.choice.decomposition != "none" and c.choice.bits == "32/32",
    lambda c: c.choice.decomposition == "none" and c.choice.bits == "8/8",
    lambda c: c.choice.decomposition != "none" and c.choice.bits == "8/8",
    lambda c: c.choice.weight_bits == 4,
)


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """A row for each architecture."""
    names = arguments.architectures or (QUICK if arguments.quick else tuple(NETWORKS))
    rows = [_row(name) for name in names]
    holds = all(not row["failed"] for row in rows)
    scope = (
        f"{len(rows)} small networks of random weights ({', '.join(names)}): a measured table of candidates, a plan "
        f"that mixes decompositions, 8/8 and 4-bit layers, compressed with {BATCH_SIZE * N_BATCHES} calibration "
        f"examples; outputs of OpenVINO and torch within {TOLERANCE:g} of the compressed module's (relative root mean "
        f"square), of the float plan within {FLOAT_TOLERANCE:g}; read again to the bit; an export with ONNX, "
        "OpenVINO and pt2 files of any batch and, where nothing else is told, of texts of any length, verified; "
        f"{' and '.join(UNTESTED)} untested"
    )
    target = {"failed": 0, "tolerance": TOLERANCE, "float_tolerance": FLOAT_TOLERANCE}
    return {"rows": rows, "target": target, "holds": holds, "scope": scope}, [
        line for row in rows for line in _lines(row)
    ]


def study_of(name: str) -> rs.StudySpec:
    """A study of the network of that name, whose targets are the dense network's own outputs."""
    model = network(name)
    random = torch.Generator().manual_seed(2)
    inputs = [NETWORKS[name].inputs(BATCH_SIZE, random) for _ in range(N_BATCHES)]
    with evaluating(model):
        batches = [(batch, tensors(call_model(model, batch))[0].clone()) for batch in inputs]
    return rs.StudySpec(
        name=name,
        model=lambda: model,
        data=lambda: rs.Data(calibration=batches, validation=batches),
        loss=lambda outputs, wanted: (tensors(outputs)[0] - wanted).square().mean(),
        score=_closeness,
        target=rs.Target(runtime="openvino", batch_size=BATCH_SIZE, threads=2),
        space=rs.Space(weight_bits=[32, 8, 4]),
    )


def mixed_plan(table: Profile) -> Plan:
    """The mildest candidate of each layer that fulfils its wish, the wishes taken in turn; any change where none does.

    A wish that a layer cannot fulfil is the next layer's.
    """
    open_wishes = list(WISHES)
    layers = {}
    for layer in table.layers:
        wish = next((wish for wish in open_wishes if any(map(wish, layer.candidates))), None)
        layers[layer.name] = _mildest(layer, wish or (lambda _: True)).choice
        if wish is not None:
            open_wishes.remove(wish)
            open_wishes = open_wishes or list(WISHES)
    return Plan(layers=layers)


def _mildest(layer: LayerProfile, wish: Callable[[Candidate], bool]) -> Candidate:
    return min(filter(wish, layer.candidates), key=lambda candidate: candidate.loss)


def _closeness(outputs: Any, wanted: Tensor) -> Tensor:
    """For each example 1 less its squared error over what is wanted's variance."""
    found = torch.as_tensor(tensors(outputs)[0])
    return 1 - (found - wanted).flatten(1).square().mean(1) / wanted.var().clamp_min(1e-12)


def _row(name: str) -> dict[str, Any]:
    """What became of one network; every check is made that can still be."""
    started = time.perf_counter()
    row: dict[str, Any] = {"architecture": name, "n_layers": 0, "plan": ""}
    row |= {"skipped": {}, "failed": {}, "fixed_lengths": {}}
    with _folder() as folder:
        try:
            for check, complaint in _checks(name, folder, row):
                if complaint:
                    row["failed"][check] = complaint
        except Exception as error:  # whatever it is, other rows go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            row["failed"]["it ends"] = f"{type(error).__name__} in {Path(where.filename).name}: {str(error)[:300]}"
    row["seconds"] = round(time.perf_counter() - started, 1)
    print("\n".join(_lines(row)), file=sys.stderr)
    return row


def _checks(name: str, folder: Path, row: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each check with what is wrong, None where it holds; notes in `row` what was found."""
    bench = open_workbench(study_of(name))
    row.update(n_layers=len(bench.found.all), skipped=dict(bench.found.skipped))
    table = make_profile(bench, bench.factorisations(), control_plans(bench), dense_latency(bench)[0], lambda _: None)
    plan = mixed_plan(table)
    row.update(plan=plan.summary())
    yield "the plan mixes", _unmixed(plan)
    model = compress(
        bench.model, plan, calibration=bench.calibration, loss=bench.spec.loss, weight_limit=bench.weight_limit,
        shared=bench.shared,
    )  # fmt: skip
    for runtime in ("openvino", "torch"):
        yield f"{runtime} runs it", _apart(bench, model, runtime, TOLERANCE)
        yield (
            f"{runtime} runs it in float",
            _apart(bench, rs.rebuild(bench.model, plan.in_float), runtime, FLOAT_TOLERANCE),
        )
    bundle, export = folder / "bundle", folder / "export"
    write_bundle(bench, plan, model, bundle)
    yield "it is read again to the bit", _differs(bench, model, load(bundle, network(name)))
    portable: list[tuple[str, str | None]] = []
    export_bundle(
        bundle, export, {"model_bytes": packed_bytes(model)}, lambda _: "", Provenance(), force=False,
        add=lambda to: portable.extend(_portable(bench, model, to, row["fixed_lengths"])),
    )  # fmt: skip
    yield from portable
    for check in verify_folder(export, trusted=True):
        yield check.name, None if check.holds and not check.skipped else check.found


def _unmixed(plan: Plan) -> str | None:
    """Which of decompositions, 8/8 and 4 bits no layer has; None where there is each."""
    choices = plan.layers.values()
    there = {
        "decomposition": any(c.decomposition != "none" for c in choices),
        "8/8": any(c.bits == "8/8" for c in choices),
        "4 bits": any(c.weight_bits == 4 for c in choices),
    }
    missing = [what for what, is_there in there.items() if not is_there]
    return f"no layer has {', '.join(missing)}" if missing else None


def _apart(bench: Workbench, model: nn.Module, runtime: str, tolerance: float) -> str | None:
    """How far the runtime's outputs are from torch's own, where that is too far."""
    target = rs.Target(runtime=runtime, batch_size=BATCH_SIZE, threads=2)
    session = get_runtime(runtime).prepare(model, bench.example, target)
    with evaluating(model):
        outputs = call_model(model, bench.example)
    wanted = dict(outputs) if isinstance(outputs, Mapping) else {str(i): v for i, v in enumerate(tensors(outputs))}
    distance = relative_to(wanted, session.run(to_arrays(bench.example)))
    return None if distance <= tolerance else f"relative difference {distance:.1e}"


def _differs(bench: Workbench, model: nn.Module, again: nn.Module) -> str | None:
    with evaluating(model), evaluating(again):
        pairs = zip(*(tensors(call_model(m, bench.example)) for m in (model, again)), strict=True)
        return None if all(torch.equal(one, other) for one, other in pairs) else "its outputs differ"


def _portable(
    bench: Workbench, model: nn.Module, folder: Path, fixed_lengths: dict[str, str]
) -> Iterator[tuple[str, str | None]]:
    """Each file for other programs, of any batch, which is compared with torch at two batches as it is written.

    Notes in `fixed_lengths` where texts cannot be of any length, and why.
    """
    for name, form in FORMATS.items():
        complaint = None
        try:
            (written,) = write_portable(model, bench.example, folder, [name])
            if written.note is not None:
                fixed_lengths[name] = written.note[:300]
        except rs.RankSearchError as error:
            complaint = str(error)[:300]
            (folder / form.file).unlink(missing_ok=True)
        yield f"{name} of any batch", complaint


@contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder, which holds the caches as well, and short timings meanwhile: nothing here asks for a latency."""
    with tempfile.TemporaryDirectory() as directory:
        wanted = {"RANKSEARCH_CACHE": str(Path(directory) / "cache"), "RANKSEARCH_MAX_TIMING_SECONDS": "0.005"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    state = "holds" if not row["failed"] else "FAILS"
    yield (
        f"  {row['architecture']:18} {state}  {row['n_layers']:3} layers, {len(row['skipped']):2} skipped, "
        f"{row['seconds']:5.1f} s: {row['plan']}"
    )
    yield from (f"      skipped {names}: {reason}" for reason, names in _by_reason(row["skipped"]))
    yield from (f"      {name} of one length: {reason}" for name, reason in row["fixed_lengths"].items())
    yield from (f"      {check}: {complaint}" for check, complaint in row["failed"].items())


def _by_reason(skipped: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Each reason with how many layers it kept out, and the first of them."""
    counts = Counter(skipped.values())
    for reason, count in counts.items():
        first = next(name for name, found in skipped.items() if found == reason)
        yield reason, f"{first} and {count - 1} more" if count > 1 else first
