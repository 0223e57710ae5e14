"""Quality without training: the accuracy that is left when a share of the parameters is cut."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from decompositions_candidates import MIXTURE, Candidate, Candidates, candidates
from decompositions_networks import Subject

import ranksearch as rs
from ranksearch.compression import compress, count_params
from ranksearch.optimization.prices import price_path
from ranksearch.optimization.table import Table
from ranksearch.plan import Plan
from ranksearch.recovery import reestimate_batchnorm
from ranksearch.scoring import paired_drop, score_model

CUTS = (0.36, 0.50)
N_BATCHNORM = 2048
# Liebenwein et al. (2021), one shot, ResNet-20: points lost by cut, as another work digitised them.
PUBLISHED = {("ResNet-20", 0.36): 5.2, ("ResNet-20", 0.50): 25.2}
Row = dict[str, Any]


def answer(
    subjects: Sequence[Subject], targets: Mapping[tuple[str, float], float], *, multiple: int, alone: bool
) -> tuple[dict[str, Any], list[str]]:
    """The mixture of all methods and, where `alone`, each method by itself, at every cut."""
    rows = [row for subject in subjects for row in _rows(subject, multiple, alone=alone)]
    judged = [row for row in rows if row["methods"] == "mixture" and (row["network"], row["wanted_cut"]) in targets]
    holds = bool(judged) and all(
        row["drop"] is not None and row["drop"] <= targets[row["network"], row["wanted_cut"]] for row in judged
    )
    scope = (
        "float32, no training; ranks by a price on parameters over predicted losses, factors fitted to training "
        "images, last factors solved again, BatchNorm estimated anew; drop in points on the test split, paired 95 %"
    )
    target = {f"{network} {cut:.0%}": points for (network, cut), points in targets.items()}
    return {"rows": rows, "target": target, "holds": holds, "scope": scope}, _lines(rows)


def cheapest_plan(subject: Subject, table: Candidates, cut: float) -> Plan | None:
    """The plan of least predicted loss, of those that a price on parameters decodes to, that cuts so much.

    What the budget leaves over goes to the layers where it saves most. None where no plan cuts so much.
    """
    most = (1 - cut) * count_params(subject.model)
    others = count_params(subject.model) - sum(layer[0].n_params for layer in table.values())
    for indices in price_path(_as_prices_want_it(table), 0.0, 1.0):
        chosen = [layer[i] for layer, i in zip(table.values(), indices, strict=True)]
        left = int(most) - others - sum(candidate.n_params for candidate in chosen)
        if left >= 0:
            spent = _spend(chosen, list(table.values()), left)
            return Plan(layers={name: candidate.choice for name, candidate in zip(table, spent, strict=True)})
    return None


def _spend(chosen: Sequence[Candidate], layers: Sequence[Sequence[Candidate]], left: int) -> list[Candidate]:
    """The choices, one after the other put in place of a better one that takes at most what is `left` of parameters."""
    spent = list(chosen)
    while True:
        better = [
            ((old.loss - new.loss) / max(new.n_params - old.n_params, 1), i, new)
            for i, (old, layer) in enumerate(zip(spent, layers, strict=True))
            for new in layer
            if new.loss < old.loss and new.n_params - old.n_params <= left
        ]
        if not better:
            return spent
        _, i, new = max(better, key=lambda entry: entry[0])
        left -= new.n_params - spent[i].n_params
        spent[i] = new


def _rows(subject: Subject, multiple: int, *, alone: bool) -> Iterator[Row]:
    table = candidates(subject, multiple, fine=True)
    dense = score_model(subject.model, subject.test, rs.top1, source="test")
    for methods in ("mixture", *(MIXTURE if alone else ())):
        for cut in CUTS:
            plan = cheapest_plan(subject, _restricted(table, methods), cut)
            row: Row = {"network": subject.name, "methods": methods, "wanted_cut": cut, "cut": None, "drop": None}
            row["published"] = PUBLISHED.get((subject.name, cut)) if methods == "mixture" else None
            if plan is None:
                yield row
                continue
            model = compress(
                subject.model, plan, calibration=subject.calibration, factorisations=subject.factorisations
            )
            norms = model, subject.training, subject.model, subject.calibration, subject.loss
            reestimate_batchnorm(*norms, n_examples=N_BATCHNORM)
            drop = paired_drop(dense, score_model(model, subject.test, rs.top1, source="test"), rs.top1, True, 0)
            assert drop.low is not None and drop.high is not None, "top-1 has an interval"
            yield row | {
                "cut": 1 - count_params(model) / count_params(subject.model),
                "drop": 100 * drop.value,
                "low": 100 * drop.low,
                "high": 100 * drop.high,
                "summary": plan.summary(),
            }


def _restricted(table: Candidates, methods: str) -> Candidates:
    """The table with dense and the candidates of one method only, unless the mixture is asked for."""
    if methods == "mixture":
        return table
    return {name: [c for c in layer if c.choice.decomposition in ("none", methods)] for name, layer in table.items()}


def _as_prices_want_it(table: Candidates) -> Table:
    """Losses and parameters in the prices' own form; latency does not count."""
    shape = (len(table), max(map(len, table.values())))
    loss, n_params = np.full(shape, np.inf), np.zeros(shape)
    for row, layer in enumerate(table.values()):
        loss[row, : len(layer)] = [candidate.loss for candidate in layer]
        n_params[row, : len(layer)] = [candidate.n_params for candidate in layer]
    return Table(loss=loss, latency=np.zeros(shape), bytes=n_params, dense=(0,) * len(table))


def _lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        start = f"  {row['network']:10} {row['methods']:20} {row['wanted_cut']:4.0%}"
        if row["drop"] is None:
            lines.append(f"{start}   no plan cuts so much")
            continue
        published = "" if row["published"] is None else f"   ALDS {row['published']}"
        figures = f"{row['drop']:6.2f} ({row['low']:.2f} to {row['high']:.2f})"
        lines.append(f"{start} (cut {row['cut']:.1%}) {figures}{published}   {row['summary']}")
    return lines
