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
    "f1": "scores",
    "macro_f1": "scores",
    "nll_per_token": "scores",
    "pair_spearman": "scores",
    "perplexity": "scores",
    "spearman": "scores",
    "top1": "scores",
    "adapters": "adapters",
    "register_decomposition": "decompositions",
    "compress": "compression",
    "expose_layers": "exposing",
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
    "adapters",
    "compress",
    "corpus_score",
    "evaluate",
    "expose_layers",
    "f1",
    "finish",
    "load",
    "macro_f1",
    "measure_latency",
    "nll_per_token",
    "pair_spearman",
    "perplexity",
    "profile",
    "rebuild",
    "register_decomposition",
    "register_runtime",
    "remeasure_front",
    "save",
    "search",
    "spearman",
    "suggest_plan",
    "top1",
]

if TYPE_CHECKING:
    from ranksearch import adapters
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
    from ranksearch.exposing import expose_layers
    from ranksearch.full_training import finish
    from ranksearch.latency import measure_latency
    from ranksearch.optimization import PriceSampler, ResolvedLimits, suggest_plan
    from ranksearch.other_target import remeasure_front
    from ranksearch.plan import LayerChoice, Plan
    from ranksearch.recovery_settings import NuclearNorm, Recovery
    from ranksearch.run import evaluate, profile, search
    from ranksearch.runtimes import register_runtime
    from ranksearch.scores import f1, macro_f1, nll_per_token, pair_spearman, perplexity, spearman, top1
    from ranksearch.search_result import SearchResult
    from ranksearch.spec import Data, Goals, Space, StudySpec, Target, corpus_score


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = importlib.import_module(f"ranksearch.{_HOMES[name]}")
        return module if name == _HOMES[name] else getattr(module, name)
    raise AttributeError(f"module 'ranksearch' has no attribute {name!r}")
