"""What a plan's accuracy drops by: the table's losses, refitted to the drops that trials measured (Bayesian ridge).

A layer's predicted loss is multiplied by what experience says of the layer, of its decomposition and of rounding; the
sum, or a power mean of it, goes through a curve to the drop. So few trials teach much: a layer that was in no plan
yet keeps the profile's word, and one whose plans lose more than predicted becomes dearer for the next ones. The
distance of a plan's outputs to dense's, which is smooth where a score is coarse, teaches the same factors.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ranksearch.optimization.loss_table import SMALLEST_LOSS, LossTable
from ranksearch.optimization.table import Floats, Indices, picked

# Drops are counted in units of what would be too much; beyond three of them a plan is ruined, however much it loses.
RUINED = 3.0
# Losses add up in power (1), as of independent errors, or nearer to amplitude (0.5), as of errors of one direction.
POWERS = (1.0, 0.7, 0.5)

# What is expected before any trial, and how surely (standard deviations): a mild plan's drop, then for drops and for
# distances, over the anchor's loss, their logarithm at the anchor and its slope over the logarithm of the loss.
CURVES = ((0.0, 0.05), (-1.0, 2.0), (0.8, 0.3), (0.0, 1.5), (1.0, 0.3))
# Spreads of the logarithms of factors on losses.
LAYER_SPREAD, METHOD_SPREAD = 0.5, 0.7
LEAST_SLOPE = 0.1
# How far off a fitted drop is, relative to itself and at least; more where the residuals say so.
RELATIVE_ERROR, LEAST_ERROR = 0.15, 0.02
DISTANCE_ERROR = 0.2  # of its logarithm
N_AS_EXPECTED, LARGEST_EXCESS, LEAST_SCALE = 5, 9.0, 0.5
N_STEPS, N_MORE_STEPS = 5, 2
LARGEST_STEP = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What trials measured: plans (n_trials, n_layers), their drops in score units with their standard deviations, and
    the distances of their outputs to dense's, NaN where there is none.
    """

    plans: Indices
    drops: Floats
    deviations: Floats
    distances: Floats

    @property
    def resolution(self) -> float:
        """A drop that the trials' noise can barely tell from none: their median deviation; 0 without trials."""
        noisy = self.deviations[self.deviations > 0]
        return float(np.median(noisy)) if len(noisy) else 0.0

    def last(self, n: int) -> Self:
        """The last `n` trials."""
        return type(self)(
            plans=self.plans[-n:],
            drops=self.drops[-n:],
            deviations=self.deviations[-n:],
            distances=self.distances[-n:],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What experience says: of the curves, and as logarithms of factors on losses; views of one vector."""

    mild: float
    level: float
    slope: float
    distance_level: float
    distance_slope: float
    layers: Floats
    methods: Floats
    rounding: float

    @classmethod
    def of(cls, vector: Floats, table: LossTable) -> Self:
        """The parameters out of a vector in the order of the fields."""
        curves, n_curves = [float(value) for value in vector[: len(CURVES)]], len(CURVES)
        return cls(
            mild=curves[0],
            level=curves[1],
            slope=max(curves[2], LEAST_SLOPE),
            distance_level=curves[3],
            distance_slope=max(curves[4], LEAST_SLOPE),
            layers=vector[n_curves : n_curves + table.n_layers],
            methods=vector[n_curves + table.n_layers : -1],
            rounding=float(vector[-1]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DropModel:
    """Drops fitted to trials, with how sure that is: `mean` and `precision` (inverse covariance) of the parameters.

    `power` is that of the mean that losses add up in; `error_scale` how many times what is expected of them fitted
    drops are off.
    """

    table: LossTable
    power: float
    mean: Floats
    precision: Floats
    error_scale: float
    evidence: float

    @classmethod
    def fit(cls, table: LossTable, observed: Observed) -> Self:
        """The model of best evidence over the power means; one's parameters are where the next one's fit begins."""
        start, _ = _prior(table)
        models: list[Self] = []
        for power, n_steps in zip(POWERS, (N_STEPS, *[N_MORE_STEPS] * (len(POWERS) - 1)), strict=True):
            models.append(cls._fitted(table, power, observed, start, n_steps))
            start = models[-1].mean
        return max(models, key=lambda model: model.evidence)

    @classmethod
    def _fitted(cls, table: LossTable, power: float, observed: Observed, start: Floats, n_steps: int) -> Self:
        """Gauss-Newton steps to the mode of the posterior; its evidence by Laplace's approximation."""
        expected, precision = _prior(table)
        rows = _Rows.of(table, power, observed)
        mean = start
        for _ in range(n_steps):
            residuals, variance, jacobian = rows.at(mean)
            weighted = jacobian / variance[:, None]
            hessian = weighted.T @ jacobian + np.diag(precision)
            step = np.linalg.solve(hessian, weighted.T @ residuals - precision * (mean - expected))
            mean = mean + step * min(1.0, LARGEST_STEP / max(float(np.abs(step).max()), LARGEST_STEP))
        residuals, variance, _ = rows.at(mean)
        misfit = float((residuals**2 / variance + np.log(variance)).sum())
        surprise = float((precision * (mean - expected) ** 2 - np.log(precision)).sum())
        return cls(
            table=table,
            power=power,
            mean=mean,
            precision=hessian,
            error_scale=rows.error_scale(mean),
            evidence=-0.5 * (misfit + surprise + float(np.linalg.slogdet(hessian)[1])),
        )

    def drawn(self, rng: np.random.Generator) -> Self:
        """The model with parameters drawn from what is still possible (Thompson sampling)."""
        # With precision = root @ root.T, the covariance is that of root.T^-1 times independent normals.
        root = np.linalg.cholesky(self.precision)
        return replace(self, mean=self.mean + np.linalg.solve(root.T, rng.standard_normal(len(root))))

    def losses(self) -> Floats:
        """What each candidate adds to the sum that decides the drop, by (layer, candidate); infinite where none is."""
        sums = _summands(self.table, self.power, Parameters.of(self.mean, self.table))
        return np.where(self.table.offered, sums[0] + sums[1], np.inf)

    def predict(self, plans: Indices) -> Floats:
        """The drop of each plan (n_plans, n_layers), in score units."""
        return _drops(_places(self.table, self.power, self.mean, plans))[0] * self.table.unit

    def deviations(self, plans: Indices) -> Floats:
        """How far off the prediction may be, as a standard deviation in score units."""
        drops, jacobian = _drops(_places(self.table, self.power, self.mean, plans))
        uncertain = (jacobian * np.linalg.solve(self.precision, jacobian.T).T).sum(axis=1)
        variance: Floats = np.maximum(uncertain, 0.0) + (self.error_scale * _errors(drops)) ** 2
        return np.sqrt(variance) * self.table.unit

    def shrunk(self, plans: Indices, drops: Floats, deviations: Floats) -> tuple[Floats, Floats]:
        """Measured drops moved towards the prediction by how much less sure they are; and their deviations then.

        What is too much stays: the curve ends there, and so does what it can tell.
        """
        predicted = self.predict(plans)
        error = self.error_scale * _errors(predicted / self.table.unit) * self.table.unit
        trust = np.where(drops >= self.table.unit, 1.0, error**2 / (error**2 + deviations**2))
        return predicted + trust * (drops - predicted), np.sqrt(trust) * deviations


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where plans lie on the curves: logarithms of their power means over the anchor's, and how factors move them."""

    parameters: Parameters
    place: Floats
    jacobian: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The rows of the regression: drops, in units, and after them the logarithms of distances where there are any."""

    table: LossTable
    power: float
    plans: Indices
    drops: Floats
    noise: Floats
    told: NDArray[np.int64]
    log_distances: Floats

    @classmethod
    def of(cls, table: LossTable, power: float, observed: Observed) -> Self:
        told = np.flatnonzero(observed.distances > SMALLEST_LOSS)
        return cls(
            table=table,
            power=power,
            plans=observed.plans,
            drops=np.minimum(observed.drops / table.unit, RUINED),
            noise=observed.deviations / table.unit,
            told=told,
            log_distances=np.log(observed.distances[told]) - table.anchor_place(1.0),
        )

    def at(self, mean: Floats) -> tuple[Floats, Floats, Floats]:
        """Residuals, their expected squares, and the fit's derivatives by the parameters."""
        places = _places(self.table, self.power, mean, self.plans)
        drops, by_drop = _drops(places)
        distances, by_distance = _log_distances(places)
        variance = self.noise**2 + (self._scale(drops) * _errors(drops)) ** 2
        return (
            np.concatenate([self.drops - drops, self.log_distances - distances[self.told]]),
            np.concatenate([variance, np.full(len(self.told), DISTANCE_ERROR**2)]),
            np.concatenate([by_drop, by_distance[self.told]]),
        )

    def error_scale(self, mean: Floats) -> float:
        """How many times what is expected fitted drops are off."""
        return self._scale(_drops(_places(self.table, self.power, mean, self.plans))[0])

    def _scale(self, fitted: Floats) -> float:
        """Noise taken out, and against a few that are off as expected."""
        squares = np.minimum(((self.drops - fitted) ** 2 - self.noise**2) / _errors(fitted) ** 2, LARGEST_EXCESS)
        mean = (N_AS_EXPECTED + squares.sum()) / (N_AS_EXPECTED + len(squares))
        return float(np.sqrt(max(mean, LEAST_SCALE**2)))


def _prior(table: LossTable) -> tuple[Floats, Floats]:
    """What is expected of the parameters before any trial, and their precisions."""
    n_factors = table.n_layers + table.n_methods + 1
    mean = np.concatenate([[value for value, _ in CURVES], np.zeros(n_factors)])
    spread = np.full(len(mean), METHOD_SPREAD)
    spread[: len(CURVES)] = [value for _, value in CURVES]
    spread[len(CURVES) : len(CURVES) + table.n_layers] = LAYER_SPREAD
    return mean, spread**-2.0


def _errors(drops: Floats) -> Floats:
    """How far off fitted drops are expected to be, in units."""
    return LEAST_ERROR + RELATIVE_ERROR * np.abs(drops)


def _summands(table: LossTable, power: float, parameters: Parameters) -> tuple[Floats, Floats]:
    """What decomposition and rounding of each candidate add to the sum, by (layer, candidate)."""
    factors = np.exp(power * (parameters.layers[:, None] + parameters.methods[table.method]))
    return factors * table.decomposed**power, np.exp(power * parameters.rounding) * table.rounded**power


def _places(table: LossTable, power: float, vector: Floats, plans: Indices) -> _Places:
    parameters = Parameters.of(vector, table)
    decomposed, rounded = (picked(part, plans) for part in _summands(table, power, parameters))
    total = decomposed.sum(axis=1) + rounded.sum(axis=1) + SMALLEST_LOSS**power
    shares = decomposed / total[:, None]
    chosen = table.method[np.arange(table.n_layers), plans]
    by_method = np.stack([(shares * (chosen == m)).sum(axis=1) for m in range(table.n_methods)], axis=1)
    by_rounding = rounded.sum(axis=1) / total
    return _Places(
        parameters=parameters,
        place=np.log(total) / power - table.anchor_place(power),
        jacobian=np.concatenate([shares, by_method, by_rounding[:, None]], axis=1),
    )


def _drops(places: _Places) -> tuple[Floats, Floats]:
    """The drops of plans, in units, and their derivatives by the parameters (n_plans, n_parameters)."""
    parameters, place = places.parameters, places.place
    height = np.exp(np.clip(parameters.level + parameters.slope * place, -30.0, 30.0))
    by_height = np.exp(-height / RUINED) * height
    curves = [np.ones_like(place), by_height, by_height * place, np.zeros_like(place), np.zeros_like(place)]
    factors = (by_height * parameters.slope)[:, None] * places.jacobian
    drops = parameters.mild + RUINED * -np.expm1(-height / RUINED)
    return drops, np.concatenate([np.stack(curves, axis=1), factors], axis=1)


def _log_distances(places: _Places) -> tuple[Floats, Floats]:
    """The logarithms of the distances of plans' outputs, and their derivatives by the parameters."""
    parameters, place = places.parameters, places.place
    zeros = np.zeros_like(place)
    curves = [zeros, zeros, zeros, np.ones_like(place), place]
    distances = parameters.distance_level + parameters.distance_slope * place
    return distances, np.concatenate([np.stack(curves, axis=1), parameters.distance_slope * places.jacobian], axis=1)
