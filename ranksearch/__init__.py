"""Search, for every layer of a trained model, its decomposition, its rank and its bits."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Lazily: `import ranksearch` and `ranksearch --help` must not wait for torch.
_HOMES = {
    "RankSearchError": "errors",
    "PlanError": "errors",
    "DecompositionError": "errors",
    "RuntimeUnavailableError": "errors",
    "MeasurementError": "errors",
    "StorageError": "errors",
    "StudyError": "errors",
    "NoPlanError": "errors",
    "LayerChoice": "plan",
    "Plan": "plan",
    "Data": "spec",
    "Goals": "spec",
    "NuclearNorm": "recovery_settings",
    "Recovery": "recovery_settings",
    "Space": "spec",
    "StudySpec": "spec",
    "Target": "spec",
    "corpus_score": "spec",
    "top1": "scoring",
    "register_decomposition": "decompositions",
    "compress": "compression",
    "rebuild": "compression",
    "register_runtime": "runtimes",
    "measure_latency": "latency",
    "load": "export",
    "save": "export",
    "SearchResult": "search_result",
    "PriceSampler": "optimization",
    "ResolvedLimits": "optimization",
    "suggest_plan": "optimization",
    "evaluate": "run",
    "finish": "full_training",
    "remeasure_front": "other_target",
    "profile": "run",
    "search": "run",
}

__all__ = [
    "Data",
    "DecompositionError",
    "Goals",
    "LayerChoice",
    "MeasurementError",
    "NoPlanError",
    "NuclearNorm",
    "Plan",
    "PlanError",
    "PriceSampler",
    "RankSearchError",
    "Recovery",
    "ResolvedLimits",
    "RuntimeUnavailableError",
    "SearchResult",
    "Space",
    "StorageError",
    "StudyError",
    "StudySpec",
    "Target",
    "__version__",
    "compress",
    "corpus_score",
    "evaluate",
    "finish",
    "load",
    "measure_latency",
    "profile",
    "rebuild",
    "register_decomposition",
    "register_runtime",
    "remeasure_front",
    "save",
    "search",
    "suggest_plan",
    "top1",
]

if TYPE_CHECKING:
    from ranksearch.compression import compress, rebuild
    from ranksearch.decompositions import register_decomposition
    from ranksearch.errors import (
        DecompositionError,
        MeasurementError,
        NoPlanError,
        PlanError,
        RankSearchError,
        RuntimeUnavailableError,
        StorageError,
        StudyError,
    )
    from ranksearch.export import load, save
    from ranksearch.full_training import finish
    from ranksearch.latency import measure_latency
    from ranksearch.optimization import PriceSampler, ResolvedLimits, suggest_plan
    from ranksearch.other_target import remeasure_front
    from ranksearch.plan import LayerChoice, Plan
    from ranksearch.recovery_settings import NuclearNorm, Recovery
    from ranksearch.run import evaluate, profile, search
    from ranksearch.runtimes import register_runtime
    from ranksearch.scoring import top1
    from ranksearch.search_result import SearchResult
    from ranksearch.spec import Data, Goals, Space, StudySpec, Target, corpus_score


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ranksearch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ranksearch' has no attribute {name!r}")
