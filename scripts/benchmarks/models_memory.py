"""Causal, wide and deep: what the statistics, the table of candidates and the compression of large models take.

`causal` is the architecture of SmolLM2-135M (its published configuration, random weights: neither time nor memory
depends on their values); `wide` a block of attention and a gated MLP, all 4,096 wide, of which each layer is factored
once; `deep` four such blocks, whose statistics are more than is held at once. Each runs in a process of its own, whose
peak of resident memory the system tells; seconds are of its wall clock.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.compression import compress
from ranksearch.controls import control_plans
from ranksearch.factorisations import Factorisations
from ranksearch.finding import compressible_layers
from ranksearch.plan import LayerChoice, Plan
from ranksearch.session import dense_latency, make_profile
from ranksearch.statistics import collect
from ranksearch.workbench import open_workbench

Stages = list[tuple[str, float]]
GIB = 1 << 30
SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
BLOCK_4096 = {
    "hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a subject may take, and the sizes at which it is asked: `sizes` go over those of its configuration."""

    gib: float
    seconds: float | None = None
    n_tokens: int = 32
    batch_size: int = 1
    n_batches: int = 32
    sizes: Mapping[str, int] = field(default_factory=dict)


FULL = {
    "causal": Limits(gib=8, seconds=600),
    "wide": Limits(gib=8, n_batches=8),
    "deep": Limits(gib=8, n_batches=8, sizes={"num_hidden_layers": 4}),
}
QUICK = {
    "wide": Limits(
        gib=2, n_batches=4, sizes={"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    ),
}  # fmt: skip


def answer(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Seconds by stage and the peak of memory, measured in a process of its own."""
    limits = _limits(name, quick=arguments.quick)
    command = [sys.executable, __file__, name, "quick" if arguments.quick else "full"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "RANKSEARCH_CACHE": folder, "RANKSEARCH_MAX_TIMING_SECONDS": "0.05"}
        environment.pop("OMP_NUM_THREADS", None)
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    own_sizes = ", ".join(f"{size} {value}" for size, value in limits.sizes.items())
    scope = (
        f"{SUBJECTS[name].__doc__} {limits.n_batches} batches of {limits.batch_size} sequences of {limits.n_tokens} "
        f"tokens; random weights, {os.cpu_count()} cores{'; ' if own_sizes else ''}{own_sizes}"
    )
    if ended.returncode != 0:
        failed = f"its process ended with {ended.returncode}"
        return {"holds": False, "scope": scope, "failed": failed}, [f"  {failed}"]
    found = json.loads(ended.stdout.splitlines()[-1])
    total = sum(found["seconds"].values())
    holds = found["peak_gib"] <= limits.gib and (limits.seconds is None or total <= limits.seconds)
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found["seconds"].items())
    line = f"  {total:.0f} s in all ({stages}), peak of {found['peak_gib']:.2f} GiB, {found['n_layers']} layers"
    target = {"gib": limits.gib, "seconds": limits.seconds}
    return {**found, "total_seconds": total, "target": target, "holds": holds, "scope": scope}, [line]


def causal(limits: Limits, stages: Stages) -> int:
    """SmolLM2-135M: statistics, the table of svd and 8 bits, and a plan of both compressed."""
    inputs = _sequences(limits, SMOLLM2_135M)
    batches = [(batch, batch["input_ids"].roll(-1, 1)) for batch in inputs]
    study = rs.StudySpec(
        name="causal",
        model=partial(_network, SMOLLM2_135M, limits),
        data=lambda: rs.Data(calibration=batches, validation=batches[:1]),
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten()),
        score=lambda outputs, targets: (torch.as_tensor(outputs["logits"]).argmax(-1) == targets).float().mean(1),
        target=rs.Target(runtime="openvino", batch_size=1),
        space=rs.Space(decompositions=["none", "svd"], weight_bits=[32, 8]),
    )
    bench = open_workbench(study)
    stages.append(("opening", time.perf_counter()))
    factorisations = bench.factorisations()
    stages.append(("statistics", time.perf_counter()))
    table = make_profile(bench, factorisations, control_plans(bench), dense_latency(bench)[0], _heard)
    stages.append(("table", time.perf_counter()))
    # The middle of each layer's candidates, which are ordered by latency.
    plan = Plan(layers={layer.name: layer.candidates[len(layer.candidates) // 2].choice for layer in table.layers})
    compress(
        bench.model, plan, calibration=bench.calibration, factorisations=factorisations,
        weight_limit=bench.weight_limit, shared=bench.shared,
    )  # fmt: skip
    stages.append(("compression", time.perf_counter()))
    return len(table.layers)


def wide(limits: Limits, stages: Stages) -> int:
    """A block of attention and a gated MLP, 4,096 wide: statistics, then each layer cut by svd to an eighth."""
    return _cut(limits, stages, slice(None))


def deep(limits: Limits, stages: Stages) -> int:
    """Four blocks of attention and a gated MLP, 4,096 wide: statistics, then the last layer cut by svd to an eighth."""
    return _cut(limits, stages, slice(-1, None))


def _cut(limits: Limits, stages: Stages, cut: slice) -> int:
    model = _network(BLOCK_4096, limits).eval()
    inputs = _sequences(limits, BLOCK_4096)
    layers = compressible_layers(model, inputs[0]).layers
    stages.append(("opening", time.perf_counter()))
    batches = [(batch, None) for batch in inputs]
    statistics = collect(model, layers, batches, _squares)
    stages.append(("statistics", time.perf_counter()))
    ranks = {name: min(info.spec.weight_shape) // 8 for name, info in list(layers.items())[cut]}
    plan = Plan(layers={name: LayerChoice(decomposition="svd", ranks=(rank,)) for name, rank in ranks.items()})
    compress(model, plan, calibration=batches, factorisations=Factorisations(model, statistics, only_last=True))
    stages.append(("compression", time.perf_counter()))
    return len(layers)


SUBJECTS: Mapping[str, Callable[[Limits, Stages], int]] = {"causal": causal, "wide": wide, "deep": deep}


def _limits(name: str, *, quick: bool) -> Limits:
    return QUICK.get(name, FULL[name]) if quick else FULL[name]


def _squares(outputs: Any, _targets: Any) -> Tensor:
    mean: Tensor = outputs["logits"].square().mean()
    return mean


def _network(configuration: Mapping[str, Any], limits: Limits) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**configuration, **limits.sizes}, use_cache=False))


def _sequences(limits: Limits, configuration: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    n_words = {**configuration, **limits.sizes}["vocab_size"]
    random = torch.Generator().manual_seed(1)
    shape = limits.batch_size, limits.n_tokens
    return [{"input_ids": torch.randint(n_words, shape, generator=random)} for _ in range(limits.n_batches)]


def _heard(name: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{time.perf_counter():.0f} s, {peak / (1 << 20):.2f} GiB: {name}", file=sys.stderr)


def main() -> None:
    name, size = sys.argv[1:]
    stages: Stages = [("start", time.perf_counter())]
    n_layers = SUBJECTS[name](_limits(name, quick=size == "quick"), stages)
    seconds = {stage: end - start for (_, start), (stage, end) in zip(stages, stages[1:], strict=False)}
    # In KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(json.dumps({"n_layers": n_layers, "seconds": seconds, "peak_gib": peak}))


if __name__ == "__main__":
    main()
