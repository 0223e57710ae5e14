"""How long PriceSampler takes to ask, late in a study of a deep model."""

import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import create_trial

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.optimization.history_reader import DROP_INTERVAL, OUTPUT_DISTANCE
from ranksearch.optimization.price_sampler import N_SEED_PRICES, PriceSampler
from ranksearch.optimization.space import distributions, to_params
from ranksearch.plan import DENSE, LayerChoice

N_LAYERS, N_RANKS, N_TRIALS, N_ASKED = 200, 5, 1000, 15
MOST_MS = 50.0


def asking_ms() -> dict[str, Any]:
    """Milliseconds per ask after a thousand trials of two hundred layers, the first apart, which reads them all."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    profile = deep_profile()
    study = optuna.create_study(directions=["minimize"] * 3, sampler=PriceSampler(profile))
    _fill(study, profile)
    took = []
    # What it begins with costs nothing to choose.
    for _ in range(N_SEED_PRICES + 1 + N_ASKED):
        started = time.perf_counter()
        trial = study.ask(distributions(profile))
        took.append(1000 * (time.perf_counter() - started))
        study.tell(trial, [0.01, 0.5, 0.5])
    return {"median_ms": float(np.median(took[-N_ASKED:])), "first_ms": took[0], "layers": N_LAYERS, "trials": N_TRIALS}


def deep_profile(n_layers: int = N_LAYERS) -> Profile:
    """Layers of random sensitivity, each with dense and some ranks in 32 and 8 bits."""
    rng = np.random.default_rng(0)
    layers = [
        LayerProfile(name=f"layer{i}", candidates=_candidates(float(rng.lognormal(-7, 1)))) for i in range(n_layers)
    ]
    return Profile(layers=tuple(layers), dense_latency_ms=1.2 * n_layers, dense_bytes=5000 * n_layers)


def _candidates(sensitivity: float) -> tuple[Candidate, ...]:
    found = []
    for bits, speed in ((32, 1.0), (8, 0.5)):
        rounding = 0.0 if bits == 32 else 0.1 * sensitivity
        found.append(_candidate(DENSE.with_bits(bits, bits), rounding, rounding, speed))
        for rank in range(1, N_RANKS + 1):
            choice = LayerChoice(decomposition="svd", ranks=(rank,), weight_bits=bits, activation_bits=bits)
            share = rank / (N_RANKS + 1)
            found.append(_candidate(choice, sensitivity * (1 / share - 1) + rounding, rounding, speed * share))
    return tuple(sorted(found, key=lambda candidate: candidate.latency_ms))


def _candidate(choice: LayerChoice, loss: float, rounding: float, share: float) -> Candidate:
    return Candidate(choice=choice, loss=loss, rounding_loss=rounding, latency_ms=share, n_bytes=int(4000 * share))


def _fill(study: optuna.Study, profile: Profile) -> None:
    rng, space = np.random.default_rng(1), distributions(profile)
    sizes = np.array([len(layer.candidates) for layer in profile.layers])
    for _ in range(N_TRIALS):
        indices = [int(i) for i in rng.random(N_LAYERS) * sizes]
        loss, latency, size = profile.predict(indices)
        drop = 0.1 * loss + float(rng.normal(0, 0.003))
        told = {DROP_INTERVAL: [drop - 0.006, drop + 0.006], OUTPUT_DISTANCE: loss}
        study.add_trial(
            create_trial(
                params=to_params(profile, indices), distributions=space, values=[drop, latency, size], user_attrs=told
            )
        )
