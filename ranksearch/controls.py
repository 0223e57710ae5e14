"""What a user has without a search: plans that every study tries first, and records beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ranksearch.bits import offered_bits
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.disk import told_full
from ranksearch.errors import RankSearchError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.finding import WeightInfo
from ranksearch.home import StudyHome, write_json
from ranksearch.home_records import control_records
from ranksearch.layers import EmbeddingSpec, WeightSpec, in_eval_mode
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.recovery import recover
from ranksearch.remeasure import MAX_LATENCY_SECONDS, Judge, drop_columns
from ranksearch.runtimes import AbstractSession
from ranksearch.scoring import paired_drop
from ranksearch.surgery import copy_model
from ranksearch.workbench import Workbench

Row = dict[str, Any]

UNIFORM_SHARES = (0.5, 0.25)
RANK_MULTIPLE = 8


def control_plans(bench: Workbench) -> list[tuple[str, Plan]]:
    """Dense, every layer at 8 bits where the target has the kernels, and uniform ranks: (origin, plan)."""
    layers, space = bench.found.all, bench.spec.space
    plans = [("control: dense", Plan(layers=dict.fromkeys(layers, DENSE)))]
    in_8_bits = Plan(layers={name: _in_8_bits(bench, info) for name, info in layers.items()})
    if any(choice.activation_bits == 8 for choice in in_8_bits.layers.values()):
        plans.append(("control: 8 bits", in_8_bits))
    order = [name for name in ("tucker2", "spatial_svd", "svd") if name in space.decompositions]
    for share in UNIFORM_SHARES:
        plan = uniform_plan(layers, order, share, space.rank_multiple)
        if plan.changes():
            plans.append((f"control: uniform {share:.0%}", plan))
    return plans


def _in_8_bits(bench: Workbench, info: WeightInfo) -> LayerChoice:
    """The layer in 8/8 where the target has the kernel, an embedding in 8 bits where size counts; else as it is."""
    spec, is_embedding = bench.spec, isinstance(info.spec, EmbeddingSpec)
    counts, for_size = [count for count in spec.space.weight_bits if count == 8], "bytes" in spec.objectives
    offered = offered_bits(bench.runtime, info.spec, spec.target, counts, for_size=for_size)
    return next((bits.of(DENSE) for bits in offered if is_embedding or bits.activation_bits == 8), DENSE)


def uniform_plan(
    layers: Mapping[str, WeightInfo],
    decompositions: Sequence[str],
    share: float,
    rank_multiple: int | None,
) -> Plan:
    """Each layer at about `share` of its weights, by the first of `decompositions` that can; else left whole.

    Ranks are multiples of 8 where `rank_multiple` is None: a control is what a user has without measuring anything.
    """
    multiple = rank_multiple or RANK_MULTIPLE
    return Plan(
        layers={
            name: next(_uniform_choices(info.spec, decompositions, share, multiple), DENSE)
            for name, info in layers.items()
        }
    )


def _uniform_choices(
    spec: WeightSpec, decompositions: Sequence[str], share: float, rank_multiple: int
) -> Iterator[LayerChoice]:
    if isinstance(spec, EmbeddingSpec):
        return
    for name in decompositions:
        method = DECOMPOSITIONS[name]
        if method.refuse(spec) is None:
            options = method.options_for(spec)[0]
            ranks = method.uniform_ranks(spec, options, share, rank_multiple)
            if ranks is not None:
                yield LayerChoice(decomposition=name, ranks=ranks, options=dict(options))


def measure_controls(
    bench: Workbench,
    home: StudyHome,
    dense_latency_ms: float,
    on_control: Callable[[str], None],
    max_seconds: float = MAX_LATENCY_SECONDS,
) -> list[Row]:
    """The records beside the trials as rows of the front, measured once per study and kept.

    A record that cannot be had here, such as an int8 quantizer that is not installed, is a row with its reason in
    `summary` and no figures.
    """
    rows = control_records(home)
    if not rows:
        for name, measure in _records(bench, dense_latency_ms, max_seconds):
            on_control(name)
            row: Row = {**dict.fromkeys(FRONT_COLUMNS), "origin": f"control: {name}", "pareto": False}
            try:
                row |= {**measure(), "summary": name}
            except Exception as error:
                if told_full(error) is not None:
                    # It is had once there is space.
                    raise
                # A record that fails costs its row, not the study, whatever a foreign quantizer raises.
                row["summary"] = f"{name}: unavailable: {_reason(error)}"
            rows.append(row)
        write_json(home.controls, {"controls": rows})
    return rows


def _reason(error: Exception) -> str:
    """In one line; of foreign errors, which run over many and may say a key alone, with their type."""
    if isinstance(error, RankSearchError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")


def _records(bench: Workbench, dense_latency_ms: float, max_seconds: float) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What to measure, by its name."""
    judge = Judge(bench, max_seconds)
    runtime, target = bench.runtime, bench.spec.target

    def default_precision() -> Row:
        session = runtime.prepare(bench.model, bench.example, replace(target, precision="default"))
        return _session_row(judge, session, dense_latency_ms, bench.dense.model_bytes)

    def own_int8() -> Row:
        inputs = (inputs for inputs, _ in bench.calibration)
        session = runtime.quantize_own(bench.model, inputs, bench.example, target)
        return _session_row(judge, session, dense_latency_ms, session.constant_bytes())

    yield f"dense at {target.runtime}'s default precision", default_precision
    yield f"int8 by {target.runtime}'s own quantizer", own_int8
    yield "dense with the same fine-tuning", lambda: _fine_tuned_row(bench, dense_latency_ms)
    if bench.source is not bench.model:
        yield "dense as prepared", lambda: _dense_row(bench, bench.source, dense_latency_ms)


def _session_row(judge: Judge, session: AbstractSession, dense_latency_ms: float, model_bytes: int) -> Row:
    """An opened model's figures; its accuracy is the runtime's, on validation and on test."""
    figures = judge.figures(session, dense_latency_ms)
    row: Row = {name: value for name, value in figures.items() if name in FRONT_COLUMNS}
    row |= {name.removeprefix("runtime_"): value for name, value in figures.items() if name.startswith("runtime_")}
    dense = judge.bench.dense
    return row | {"model_bytes": model_bytes, "bytes_ratio": model_bytes / dense.model_bytes, "macs": dense.macs}


def _fine_tuned_row(bench: Workbench, dense_latency_ms: float) -> Row:
    """Dense after the trials' own fine-tuning: what of a plan's accuracy is training, not the plan."""
    spec = bench.spec
    model = copy_model(bench.model)
    recover(model, bench.model, bench.train, spec.loss, spec.recovery, seed=spec.seed)
    return _dense_row(bench, in_eval_mode(model), dense_latency_ms)


def _dense_row(bench: Workbench, model: nn.Module, dense_latency_ms: float) -> Row:
    """A model that is dense but for its weights: what they score."""
    spec = bench.spec
    row: Row = {"latency_ratio": 1.0, "latency_ms": dense_latency_ms, "bytes_ratio": 1.0}
    row |= {"model_bytes": bench.dense.model_bytes, "n_params": bench.dense.n_params, "macs": bench.dense.macs}
    for split, prefix in (("validation", ""), ("test", "test_")):
        batches = getattr(bench.data, split)
        if batches is not None:
            dense, tuned = bench.score(bench.model, batches), bench.score(model, batches)
            drop = paired_drop(dense, tuned, spec.score, spec.higher_is_better, spec.seed)
            row |= drop_columns(tuned.value, drop, prefix)
    return row
