"""Which search needs the fewest evaluations?

Hypervolume of (drop, latency ratio, bytes ratio) against (0.10, 1.05, 1.0): the front is chosen by validation images
and its drops are those on test images, which no search sees. A trial is a distinct plan, evaluated after BatchNorm
re-estimation; dense is known to all. Latency is the candidate table's prediction, which has no noise, so that all
searches see the same. Targets: PriceSampler covers in 10 trials what raw NSGA-II does in 200; never less than the price
sweep without search at 20, and more in the median at 50 and 100; more than seeded NSGA-II and seeded TPE at 50. Its
ablations and published rules are shown and not judged. With `--rung fine_tuned` plans are trained as the study does: in
20 trials PriceSampler covers what the price sweep does in 50. Recovered: whether what is known before training orders
plans of like latency as their fine-tuned drops do, over thirty plans in three bands; shown and not judged. Uniform: at
67 % of ResNet-20's multiply-adds cut PriceSampler's plan loses no more than uniform spatial ranks of its latency, both
trained alike. Asking: at most 50 ms after 1,000 trials of 200 layers. Evaluations are kept in the folder that
`--recorded` names and none is made twice; the ResNets need the folder that RANKSEARCH_DATA names. `--quick`: a narrow
network on the digits; ten plans of PriceSampler cover no less than twenty of NSGA-II.
"""

import argparse
import os
import sys
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Answer, Question, ask, options, scratch
from search_asking import MOST_MS, asking_ms
from search_evaluations import Evaluations, mean_seconds, open_evaluations
from search_figures import CHECKPOINTS, FRONTS, Target, Trace, pairs, quartiles, reach, share_of_time, trace, volume_at
from search_methods import METHODS, find_method, suiting
from search_published import is_published, open_published
from search_recovered import N_BANDS, N_PER_BAND, agreement, agreement_lines
from search_runs import Method
from search_subjects import STUDIES, in_float, open_subject
from search_uniform import CUT, EPOCHS, against_uniform

from ranksearch.cache import cache_directory
from ranksearch.optimization.space import n_plans

TRIALS = (10, 20, 50, 100, 200)
SEEDS: Mapping[str, int] = {"digits": 10, "linear": 10, "ResNet-20": 5, "ResNet-56": 2}
# The one to beat, and those whose last hypervolume others are timed to, in trials.
BASELINE = "price sweep"
BARS = ("NSGA-II 20", "NSGA-II 50", "TPE", "price sweep")
OURS = "PriceSampler"
TARGETS: Sequence[Target] = (
    Target(ours=OURS, ours_trials=10, other="NSGA-II 20", other_trials=200, by="median"),
    Target(ours=OURS, ours_trials=10, other="NSGA-II 50", other_trials=200, by="median"),
    Target(ours=OURS, ours_trials=20, other="price sweep", other_trials=20, by="every seed"),
    Target(ours=OURS, ours_trials=50, other="price sweep", other_trials=50, by="median"),
    Target(ours=OURS, ours_trials=100, other="price sweep", other_trials=100, by="median"),
    Target(ours=OURS, ours_trials=50, other="seeded NSGA-II", other_trials=50, by="median"),
    Target(ours=OURS, ours_trials=50, other="seeded TPE", other_trials=50, by="median"),
)
FINE_TUNED_TARGETS: Sequence[Target] = (
    Target(ours=OURS, ours_trials=20, other="price sweep", other_trials=50, by="median"),
)
QUICK_TARGET = Target(ours=OURS, ours_trials=10, other="NSGA-II 50", other_trials=20, by="every seed")
QUICK_SEEDS = 2


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=list(QUESTIONS), help="one question instead of all")
    parser.add_argument("--networks", nargs="+", choices=list(STUDIES), help="of these")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=find_method,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}, or a sampler of your own as module:Class, which is made with a seed",
    )
    parser.add_argument("--seeds", type=int, help=f"how many, instead of {dict(SEEDS)}")
    parser.add_argument(
        "--trials",
        type=int,
        nargs="+",
        help=f"where hypervolumes are told, instead of {' '.join(map(str, TRIALS))}; none between is looked at then",
    )
    parser.add_argument(
        "--published", action="store_true", help="evaluations as published: nothing is trained, loaded or timed"
    )
    parser.add_argument("--rung", choices=["quick", "fine_tuned"], default="quick", help="what plans are judged by")
    parser.add_argument(
        "--front", choices=list(FRONTS), default="estimated", help="how fronts are chosen on validation"
    )
    parser.add_argument(
        "--recorded", type=Path, default=cache_directory() / "benchmark_search", help="the folder of evaluations"
    )
    arguments = parser.parse_args()
    ask(arguments, {"quick": quick} if arguments.quick else QUESTIONS)


def hypervolumes(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Each network's table."""
    figures, lines = {}, []
    trials, targets = sorted(arguments.trials or TRIALS), TARGETS if arguments.rung == "quick" else FINE_TUNED_TARGETS
    for name in arguments.networks or [n for n in STUDIES if not arguments.published or is_published(n)]:
        evaluations = _opened(name, arguments)
        methods = dict(arguments.methods or suiting(evaluations))
        after = frozenset(trials) if arguments.trials else CHECKPOINTS.union(trials)
        traces = _traces(name, evaluations, methods, arguments.seeds or SEEDS[name], trials, after, arguments.front)
        figures[name] = _figures(evaluations, traces, trials, targets)
        lines += _lines(name, figures[name])
    judged = [met for figure in figures.values() for met in figure["targets"].values() if met is not None]
    seeds = ", ".join(f"{name} {figure['seeds']}" for name, figure in figures.items())
    return {
        "networks": figures,
        "target": [str(target) for target in targets],
        "holds": all(judged),
        "scope": f"{arguments.rung} drops; hypervolume on test images of the front chosen by {arguments.front} "
        f"validation drops; medians and quartiles over seeds: {seeds}",
    }, lines


def _opened(name: str, arguments: argparse.Namespace) -> Evaluations:
    if arguments.published:
        return open_published(name)
    return open_evaluations(open_subject(name, arguments.recorded), arguments.rung)


def recovered(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Each network's plans in bands of latency, fine-tuned."""
    figures, lines = {}, []
    for name in arguments.networks or STUDIES:
        evaluations = open_evaluations(open_subject(name, arguments.recorded))
        figures[name] = agreement(evaluations)
        lines += agreement_lines(name, figures[name])
    return {
        "networks": figures,
        "holds": True,
        "scope": f"{N_BANDS} bands of 5 % around predicted latencies, {N_PER_BAND} plans each; rank correlation with "
        "the fine-tuned drop inside bands; not judged",
    }, lines


def uniform_ranks(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """PriceSampler's plan against equal shares, on ResNet-20."""
    evaluations = open_evaluations(in_float(open_subject("ResNet-20", arguments.recorded)))
    found, lines = against_uniform(evaluations)
    return {
        **found,
        "target": "PriceSampler's plan loses no more than uniform spatial ranks of the same latency",
        "scope": f"ResNet-20, {CUT:.0%} of its multiply-adds cut, in float32, {EPOCHS:g} epochs each",
    }, lines


def asking(_arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """PriceSampler's own time."""
    found = asking_ms()
    return {
        **found,
        "target": {"at most ms per ask": MOST_MS},
        "holds": found["median_ms"] <= MOST_MS,
        "scope": f"PriceSampler after {found['trials']} trials of {found['layers']} layers",
    }, [f"  {found['median_ms']:.0f} ms per ask, {found['first_ms']:.0f} ms for the first, which reads all trials"]


def quick(_arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The digits, everything measured anew."""
    asked = {QUICK_TARGET.ours: QUICK_TARGET.ours_trials, QUICK_TARGET.other: QUICK_TARGET.other_trials}
    with scratch() as folder, mock.patch.dict(os.environ, {"RANKSEARCH_CACHE": str(folder / "cache")}):
        evaluations = open_evaluations(open_subject("digits", folder))
        traces = {
            method: _traces("digits", evaluations, {method: METHODS[method]}, QUICK_SEEDS, [n_trials], (), "estimated")[
                method
            ]
            for method, n_trials in asked.items()
        }
    found = {method: [volume_at(t, asked[method]) for t in traces[method]] for method in asked}
    return {
        "hypervolume": found,
        "trials": asked,
        "seconds": mean_seconds(evaluations.recorded),
        "target": str(QUICK_TARGET),
        "holds": QUICK_TARGET.judge(traces),
        "scope": f"a narrow network on the digits, {QUICK_SEEDS} seeds; {QUICK_TARGET}",
    }, [f"  {method} at {asked[method]}: {', '.join(f'{v:.4f}' for v in by_seed)}" for method, by_seed in found.items()]


def _traces(
    name: str,
    evaluations: Evaluations,
    methods: Mapping[str, Method],
    n_seeds: int,
    trials: Sequence[int],
    after: Container[int],
    front: str,
) -> dict[str, list[Trace]]:
    """By method one trace per seed; methods take turns, so that a run cut short has all of them for its seeds."""
    traces: dict[str, list[Trace]] = {method: [] for method in methods}
    for seed in range(n_seeds):
        for method, runner in methods.items():
            started, n_before = time.monotonic(), evaluations.n_new
            traces[method].append(trace(runner, evaluations, seed, trials, after, front))
            told = " ".join(f"{volume_at(traces[method][-1], n):.4f}" for n in trials)
            took = f"{evaluations.n_new - n_before} scored anew, {time.monotonic() - started:.0f} s"
            print(f"{name} seed {seed} {method:16} {told}   {took}", file=sys.stderr, flush=True)
    return traces


def _figures(
    evaluations: Evaluations, traces: Mapping[str, Sequence[Trace]], trials: Sequence[int], targets: Sequence[Target]
) -> dict[str, Any]:
    """A network's table, its pairs with the baseline, and how soon each method is as far as others at the end."""
    at = {method: {n: [volume_at(t, n) for t in found] for n in trials} for method, found in traces.items()}
    last = max(trials)
    return {
        "seeds": len(next(iter(traces.values()))),
        "layers": len(evaluations.profile.layers),
        "plans": n_plans(evaluations.profile),
        "evaluated": sum(split == "validation" for _, split in evaluations.recorded.rows),
        "seconds": mean_seconds(evaluations.recorded),
        "seconds_each": float(np.mean(evaluations.seconds() or [0.0])),
        "profile_seconds": evaluations.subject.profile_seconds if evaluations.subject else None,
        "hypervolume": {
            method: {n: {**quartiles(v), "all": v} for n, v in by_n.items()} for method, by_n in at.items()
        },
        "distinct_plans": {method: [max(t, default=0) for t in found] for method, found in traces.items()},
        f"paired_with_{BASELINE}": {
            method: {n: pairs(by_n[n], at[BASELINE][n]) for n in trials}
            for method, by_n in at.items()
            if BASELINE in at and method != BASELINE
        },
        f"trials_to_reach_others_at_{last}": {
            method: {bar: _reach(evaluations, found, traces[bar], last) for bar in BARS if bar in {*traces} - {method}}
            for method, found in traces.items()
        },
        "targets": {str(target): target.judge(traces) for target in targets},
    }


def _reach(evaluations: Evaluations, ours: Sequence[Trace], other: Sequence[Trace], last: int) -> dict[str, Any]:
    """How soon ours is as far as the other at the end, in trials, and in its time with the candidate table's."""
    needed = reach(ours, other, last)
    return needed | {"share_of_time": share_of_time(evaluations, needed["median"], last)}


def _lines(name: str, figure: Mapping[str, Any]) -> list[str]:
    """A network's figures as they are printed."""
    trials = list(next(iter(figure["hypervolume"].values())))
    seconds = ", ".join(f"{step} {value:.2f}" for step, value in figure["seconds"].items())
    lines = [
        f"  {name}: {figure['layers']} layers, {figure['plans']:.2g} plans, {figure['evaluated']} of them evaluated; "
        f"{figure['seeds']} seeds; seconds {seconds}",
        f"    {'trials':16}" + "".join(f"{n:>25}" for n in trials),
    ]
    for method, by_n in figure["hypervolume"].items():
        cells = [f"{v['median']:.4f} ({v['low']:.4f}-{v['high']:.4f})" for v in by_n.values()]
        lines.append(f"    {method:16}" + "".join(f"{cell:>25}" for cell in cells))
    for method, by_n in figure[f"paired_with_{BASELINE}"].items():
        cells = [f"{v['wins']}/{v['of']}, {v['median_ratio']:.3f}x" for v in by_n.values()]
        lines.append(f"    {method:16}" + "".join(f"{cell:>25}" for cell in cells) + f"   against {BASELINE}")
    reached = figure[f"trials_to_reach_others_at_{max(trials)}"]
    for method, bars in reached.items():
        cells = [f"{bar}: {_soon(v)}" for bar, v in bars.items()]
        lines.append(f"    {method:16} trials to what others have at {max(trials)}: " + "; ".join(cells))
    words = {True: "met", False: "MISSED", None: "not judged"}
    return lines + [f"    {target}: {words[met]}" for target, met in figure["targets"].items()]


def _soon(reached: Mapping[str, Any]) -> str:
    seeds, share = f"({reached['reached']}/{reached['of']})", reached["share_of_time"]
    time_taken = f", {share:.2f} of the time" if share is not None else ""
    return f"{reached['median'] or 'never'} {seeds}{time_taken}"


QUESTIONS: Mapping[str, Question] = {
    "hypervolume": hypervolumes,
    "recovered": recovered,
    "uniform": uniform_ranks,
    "asking": asking,
}


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
