"""Speed: how long it takes to factor every layer and to cut the factors of every candidate rank."""

import math
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from decompositions_candidates import ITERATIVE, MIXTURE
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS, Options, Ranks
from ranksearch.factorisations import Factorisations
from ranksearch.layers import LayerSpec, layer_spec
from ranksearch.plan import LayerChoice
from ranksearch.statistics import LayerStatistics

RANK_MULTIPLE = 8
N_DIRECTIONS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """At most so many seconds and GiB, at least so many times faster than a call per rank; None: not asked for."""

    seconds: float
    iterative_seconds: float
    peak_gib: float
    times_faster: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A method at a layer, with all the ranks that a study would offer."""

    layer: str
    spec: LayerSpec
    method: str
    options: Options
    ranks: tuple[Ranks, ...]


def answer(layers: Mapping[str, nn.Module], targets: Targets, scope: str) -> tuple[dict[str, Any], list[str]]:
    """Ours first, then the baseline, whose calls are timed on a sample."""
    jobs = list(_jobs(layers))
    torch.linalg.svd(torch.randn(64, 64))  # torch's first call loads its libraries
    warnings.simplefilter("ignore", UserWarning)  # tensorly's, of ranks above a mode's size
    statistics = {name: _statistics(module) for name, module in layers.items()}
    factorisations = Factorisations(nn.ModuleDict(layers), statistics, only_last=True)  # as in a study
    seconds = _factor(factorisations, [job for job in jobs if job.method not in ITERATIVE])
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds |= _factor(factorisations, [job for job in jobs if job.method in ITERATIVE])
    baseline = _baseline(layers, jobs)
    closed = sum(s for method, s in seconds.items() if method not in ITERATIVE)
    iterative = sum(s for method, s in seconds.items() if method in ITERATIVE)
    ratio = _times_faster(seconds, baseline, list(baseline))
    closed_ratio = _times_faster(seconds, baseline, [method for method in baseline if method not in ITERATIVE])
    n_ranks = {method: sum(len(job.ranks) for job in jobs if job.method == method) for method in seconds}
    holds = closed <= targets.seconds and iterative <= targets.iterative_seconds and peak_gib <= targets.peak_gib
    holds = holds and (targets.times_faster is None or ratio >= targets.times_faster)
    figures = {
        "closed_forms_s": closed,
        "iterative_s": iterative,
        "peak_gib": peak_gib,
        "times_faster": ratio,
        "closed_forms_times_faster": closed_ratio,
        "by_method_s": seconds,
        "baseline_s": baseline,
        "n_ranks": n_ranks,
    }
    lines = [
        f"  closed forms {closed:.1f} s, iterative {iterative:.1f} s, peak {peak_gib:.2f} GiB",
        f"  {ratio:.1f}x faster than a call per rank, the closed forms alone {closed_ratio:.1f}x",
        *(
            f"  {m:20} {n_ranks[m]:5} ranks {s:8.2f} s   baseline {baseline.get(m, math.nan):9.1f} s"
            for m, s in seconds.items()
        ),
    ]
    counted = (
        f"{scope}; random weights and covariances, ranks in multiples of {RANK_MULTIPLE}; the peak is the process's "
        "after the closed forms: Python, torch, weights, all covariances and a layer's factorisations; the baseline is "
        "one call without covariance per layer, options and rank, timed once per weight shape at the middle rank and "
        "multiplied by layers and ranks; methods without a baseline do not enter the ratio"
    )
    return {
        **figures,
        "target": asdict(targets),
        "holds": holds,
        "scope": counted,
    }, lines


def _times_faster(seconds: Mapping[str, float], baseline: Mapping[str, float], methods: list[str]) -> float:
    return sum(baseline[method] for method in methods) / sum(seconds[method] for method in methods)


def _jobs(layers: Mapping[str, nn.Module]) -> Iterator[Job]:
    for layer, module in layers.items():
        spec = layer_spec(module)
        assert spec is not None, "plain layers only"
        for name in MIXTURE:
            method = DECOMPOSITIONS[name]
            if method.refuse(spec) is not None:
                continue
            for options in method.options_for(spec):
                ranks = tuple(method.rank_choices(spec, options, RANK_MULTIPLE))
                yield Job(layer=layer, spec=spec, method=name, options=options, ranks=ranks)


def _statistics(module: nn.Module) -> LayerStatistics:
    """Covariances of the right size: some random directions of falling strength, and a little of every other."""
    n_outputs, *rest = module.get_parameter("weight").shape
    return LayerStatistics(
        input_covariance=_covariance(math.prod(rest)), output_gradient_covariance=_covariance(n_outputs)
    )


def _covariance(size: int) -> Tensor:
    directions = torch.randn(size, N_DIRECTIONS, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    scaled = directions * torch.logspace(0, -2, N_DIRECTIONS, dtype=torch.float64)
    return scaled @ scaled.T + 1e-3 * torch.eye(size, dtype=torch.float64)


def _factor(factorisations: Factorisations, jobs: list[Job]) -> dict[str, float]:
    """Seconds by method."""
    seconds: dict[str, float] = {}
    for job in jobs:
        started = time.perf_counter()
        for ranks in job.ranks:
            choice = LayerChoice(decomposition=job.method, ranks=ranks, options=dict(job.options))
            factorisations.of(job.layer, choice).factors(ranks)
        seconds[job.method] = seconds.get(job.method, 0.0) + time.perf_counter() - started
    return seconds


def _baseline(layers: Mapping[str, nn.Module], jobs: list[Job]) -> dict[str, float]:
    """Seconds by method of one call per layer, options and rank."""
    sampled: dict[tuple[object, ...], float] = {}
    seconds: dict[str, float] = {}
    for job in jobs:
        if job.method not in BASELINES or not job.ranks:
            continue
        weight = layers[job.layer].get_parameter("weight").detach()
        key = (job.method, tuple(weight.shape), str(job.options))
        if key not in sampled:
            started = time.perf_counter()
            BASELINES[job.method](weight, job.ranks[len(job.ranks) // 2], job.options)
            sampled[key] = time.perf_counter() - started
        seconds[job.method] = seconds.get(job.method, 0.0) + len(job.ranks) * sampled[key]
    return seconds


def _matrix_svd(weight: Tensor, ranks: Ranks, options: Options) -> object:
    matrix = weight.flatten(1) if options.get("folding") != "kernel_last" else weight.transpose(0, 1).flatten(1)
    return torch.linalg.svd(matrix, full_matrices=False)


def _spatial_svd(weight: Tensor, ranks: Ranks, options: Options) -> object:
    n_outputs, n_inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(n_outputs * width, n_inputs * height)
    return torch.linalg.svd(matrix, full_matrices=False)


def _grouped_svd(weight: Tensor, ranks: Ranks, options: Options) -> object:
    n_groups = int(options.get("groups", 1))
    return torch.linalg.svd(torch.stack(weight.flatten(1).chunk(n_groups, dim=1)), full_matrices=False)


def _by_input(weight: Tensor, ranks: Ranks, options: Options) -> object:
    return torch.linalg.svd(weight.transpose(0, 1).flatten(2), full_matrices=False)


def _by_output(weight: Tensor, ranks: Ranks, options: Options) -> object:
    return torch.linalg.svd(weight.flatten(2), full_matrices=False)


def _tucker2(weight: Tensor, ranks: Ranks, options: Options) -> object:
    return partial_tucker(weight.numpy(), rank=list(ranks), modes=[0, 1])


def _cp(weight: Tensor, ranks: Ranks, options: Options) -> object:
    return parafac(weight.numpy(), rank=ranks[0])


def _tensor_train(weight: Tensor, ranks: Ranks, options: Options) -> object:
    return tensor_train(weight.permute(1, 2, 3, 0).numpy(), rank=[1, *ranks, 1])


BASELINES: Mapping[str, Callable[[Tensor, Ranks, Options], object]] = {
    "svd": _matrix_svd,
    "spatial_svd": _spatial_svd,
    "grouped_svd": _grouped_svd,
    "depthwise_separable": _by_input,
    "blueprint_separable": _by_output,
    "tucker2": _tucker2,
    "cp": _cp,
    "tensor_train": _tensor_train,
}
