"""A trial run again, and whether its weights are the same bit for bit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ranksearch.device import other_cores
from ranksearch.errors import PlanError
from ranksearch.export import save
from ranksearch.plan import Plan
from ranksearch.results import Row
from ranksearch.run import evaluate_on
from ranksearch.runtimes import differing_keys
from ranksearch.spec import StudySpec
from ranksearch.trial_facts import TrialFacts
from ranksearch.versions import package_versions
from ranksearch.workbench import Workbench, open_workbench


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerun:
    """What running a trial again gave: its row, its weights' SHA-256, and what differs here from then."""

    row: Row
    sha256: str
    differences: tuple[str, ...]


def run_again(study: StudySpec, plan: Plan, then: TrialFacts) -> Rerun:
    """Takes the plan up the ladder as the trial did, with its seed and as many threads in torch; nothing is stored.

    Raises PlanError where the plan is not the trial's, or does not fit the model.
    """
    if plan.hash() != then.plan:
        raise PlanError(
            f"this is not the plan of trial {then.trial}: its hash is {plan.hash()}, that one's {then.plan}"
        )
    study = replace(study, seed=then.seed)
    with _threads(then.torch_threads), other_cores(study.target):
        return _run(open_workbench(study), plan, then)


def _run(bench: Workbench, plan: Plan, then: TrialFacts) -> Rerun:
    digests = []

    def keep(plan: Plan, model: nn.Module) -> None:
        digests.append(weights_sha256(model, plan))

    row, _ = evaluate_on(bench, plan, keep)
    return Rerun(row=row, sha256=digests[0], differences=tuple(_differing(bench, then)))


def weights_sha256(model: nn.Module, plan: Plan) -> str:
    """The SHA-256 of the file that the model's weights are packed into."""
    with tempfile.TemporaryDirectory() as folder:
        written = save(model, plan, Path(folder)).provenance
    assert written is not None and written.sha256 is not None, "save gives it"
    return written.sha256


def _differing(bench: Workbench, then: TrialFacts) -> Iterator[str]:
    """What weights may depend on and is not as it was, each as what it was and is."""
    fingerprint, versions = bench.runtime.fingerprint(bench.spec.target), package_versions()
    if bench.spec.target != then.target:
        yield f"target {then.target}, now {bench.spec.target}"
    for recorded, here in ((then.versions, versions), (then.fingerprint, fingerprint)):
        yield from (f"{name} {recorded[name]}, now {here[name]}" for name in differing_keys(recorded, here))


@contextmanager
def _threads(n_threads: int | None) -> Iterator[None]:
    """While open, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
