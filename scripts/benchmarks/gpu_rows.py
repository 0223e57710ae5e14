"""The rows of the GPU's table: what is timed in which order, each against dense in the same precision and mode."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from gpu_subjects import Subject
from torch import nn

from ranksearch.compression import rebuild
from ranksearch.controls import uniform_plan
from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.finding import compressible_layers
from ranksearch.latency import compare
from ranksearch.plan import Plan
from ranksearch.runtimes import get_runtime
from ranksearch.runtimes.pytorch.cuda import DeviceCall
from ranksearch.runtimes.pytorch.runtime import COMBINATIONS
from ranksearch.spec import Target

RANK_MULTIPLE = 16
# For a network the first that can factor a layer; for a layer each on its own.
NETWORK_METHODS = (("tucker2", "svd"), ("spatial_svd", "svd"))
LAYER_METHODS = (("tucker2",), ("spatial_svd",), ("svd",))
NETWORK_SHARES = (0.5,)
LAYER_SHARES = (0.5, 0.25, 0.125)
# The most telling first: what people deploy, then what they compare it with.
MODES = ("cuda_graph", "eager", "compile")
PRECISIONS = ("f16", "tf32", "f32", "bf16")
MIN_FLUSH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A subject, factored by the first of `methods` to `share` of its weights, in a mode and a precision."""

    subject: Subject
    methods: tuple[str, ...]
    share: float
    mode: str
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A question's answer: ratios to dense, times in ms; `problem` says why there is none."""

    subject: str
    choice: str
    mode: str
    precision: str
    dense_ms: float | None = None
    dense_p95_ms: float | None = None
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    cold_ratio: float | None = None
    cold_dense_ms: float | None = None
    cold_ms: float | None = None
    problem: str | None = None


def questions(networks: Sequence[Subject], layers: Sequence[Subject], kind: str) -> Iterator[Question]:
    """All of them, the most telling first; compiling takes longest and comes last."""
    modes = [mode for mode in MODES if mode in COMBINATIONS[kind]]
    quick, slow = [mode for mode in modes if mode != "compile"], [mode for mode in modes if mode == "compile"]
    for group in (quick, slow):
        for subjects, methods, shares in (
            (networks, NETWORK_METHODS, NETWORK_SHARES),
            (layers, LAYER_METHODS, LAYER_SHARES),
        ):
            for mode in group:
                yield from _grid(subjects, methods, shares, mode, kind)


def _grid(
    subjects: Sequence[Subject], methods: Sequence[tuple[str, ...]], shares: Sequence[float], mode: str, kind: str
) -> Iterator[Question]:
    for share in shares:
        for precision in PRECISIONS:
            if precision not in COMBINATIONS[kind][mode]:
                continue
            for chosen in methods:
                for subject in subjects:
                    if _factored(subject, chosen, share) is not None:
                        yield Question(subject=subject, methods=chosen, share=share, mode=mode, precision=precision)


def answer(question: Question, device: str, max_seconds: float) -> Row:
    """The row, measured now; of what cannot run here, why."""
    found = _factored(question.subject, question.methods, question.share)
    assert found is not None, "questions() leaves out what cannot be factored"
    plan, label = found
    row = Row(subject=question.subject.name, choice=label, mode=question.mode, precision=question.precision)
    batch = question.subject.shape[0]
    target = Target(
        runtime="torch", mode=question.mode, device=device, precision=question.precision, batch_size=batch, threads=1
    )
    try:
        return _measured(row, question.subject, plan, target, max_seconds)
    except (MeasurementError, RuntimeUnavailableError) as error:
        return Row(**{**asdict(row), "problem": f"{type(error).__name__}: {error}"})


def _measured(row: Row, subject: Subject, plan: Plan, target: Target, max_seconds: float) -> Row:
    runtime = get_runtime("torch")
    runtime.check(target)
    dense = _network(subject)
    example = torch.randn(subject.shape, generator=torch.Generator().manual_seed(0))
    calls = [runtime.prepare(m, example, target).bind(example.numpy()) for m in (rebuild(dense, plan), dense)]
    warm = compare(*calls, max_seconds=max_seconds)
    figures = {
        **asdict(row),
        "dense_ms": warm.reference_ms,
        "dense_p95_ms": warm.reference_p95_ms,
        "latency_ms": warm.latency_ms,
        "latency_p95_ms": warm.latency_p95_ms,
        "ratio": warm.ratio,
        "ratio_low": warm.ratio_low,
        "ratio_high": warm.ratio_high,
    }
    if all(isinstance(call, DeviceCall) for call in calls):
        cold = compare(*(call.cold(flush_bytes(target.device)) for call in calls), max_seconds=max_seconds)
        figures |= {"cold_ratio": cold.ratio, "cold_dense_ms": cold.reference_ms, "cold_ms": cold.latency_ms}
    return Row(**figures)


def flush_bytes(device: str) -> int:
    """Twice the GPU's L2 cache."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return max(2 * int(size), MIN_FLUSH_BYTES)


@functools.cache
def _network(subject: Subject) -> nn.Module:
    torch.manual_seed(0)
    return subject.build().eval()


@functools.cache
def _factored(subject: Subject, methods: tuple[str, ...], share: float) -> tuple[Plan, str] | None:
    """The uniform plan, and what it is called; None where no layer can be factored so."""
    model = _network(subject)
    found = compressible_layers(model, torch.zeros((1, *subject.shape[1:])))
    plan = uniform_plan(found.layers, methods, share, RANK_MULTIPLE)
    changes = plan.changes()
    if not changes:
        return None
    if len(found.layers) == 1:
        return plan, next(iter(changes.values())).label.removesuffix(" 32/32")
    return plan, f"{' or '.join(methods)}, {share:.0%} of the weights, {len(changes)} of {len(found.layers)} layers"
