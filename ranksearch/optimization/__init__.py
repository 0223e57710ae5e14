"""Which plan to try next: the space, the prices, the samplers, the loop, and how a study goes on where it stopped."""

from ranksearch.optimization.estimates import (
    DropEstimator,
    Estimates,
    FurtherDrop,
    drop_unit,
    estimated_drops,
    near_ties,
)
from ranksearch.optimization.limits import ResolvedLimits, out_of_reach
from ranksearch.optimization.loop import optimise
from ranksearch.optimization.price_sampler import PriceSampler
from ranksearch.optimization.prices import price_sweep, uniform
from ranksearch.optimization.records import TrialRecord, front, read_records, trained_evaluations
from ranksearch.optimization.samplers import DEFAULT_SAMPLER, SAMPLERS, find_sampler
from ranksearch.optimization.space import suggest_plan
from ranksearch.optimization.storage import OTHER_HOME, check_storage, coordinator_lock
from ranksearch.optimization.study import (
    check_identity,
    open_study,
    publish,
    published,
    read_study,
    study_names,
)
from ranksearch.optimization.table import decode
from ranksearch.optimization.trials import Callbacks
from ranksearch.optimization.weight_errors import measure_weights

__all__ = [
    "DEFAULT_SAMPLER",
    "OTHER_HOME",
    "SAMPLERS",
    "Callbacks",
    "DropEstimator",
    "Estimates",
    "FurtherDrop",
    "PriceSampler",
    "ResolvedLimits",
    "TrialRecord",
    "check_identity",
    "check_storage",
    "coordinator_lock",
    "decode",
    "front",
    "drop_unit",
    "estimated_drops",
    "find_sampler",
    "measure_weights",
    "near_ties",
    "open_study",
    "optimise",
    "out_of_reach",
    "price_sweep",
    "publish",
    "published",
    "read_study",
    "read_records",
    "study_names",
    "suggest_plan",
    "trained_evaluations",
    "uniform",
]
