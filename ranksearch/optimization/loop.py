"""The loop: ask for plans, have them evaluated, tell what came of them; the Optuna study is its only state."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from ranksearch.candidates import Profile
from ranksearch.disk import GO_ON
from ranksearch.early_stopping import StopRule
from ranksearch.errors import StorageError, StudyError
from ranksearch.executors import AbstractExecutor, Outcome
from ranksearch.optimization.coordination import RENEW_EVERY_S, coordinating
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.records import History, TrialRecord, read_records
from ranksearch.optimization.samplers import SamplerSetting, default_n_prices, make_sampler
from ranksearch.optimization.seeds import (
    enqueue,
    fix_seeds,
    make_seeds,
    neighbour,
    next_seed,
)
from ranksearch.optimization.space import n_plans, to_params
from ranksearch.optimization.trials import Asked, Callbacks, Search, ask_next, interrupt, settle, start, tell_duplicate
from ranksearch.optimization.weight_errors import WeightErrors, no_weight_errors
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.plan import Plan
from ranksearch.spec import Objective

# After this many duplicates in a row the sampler has converged, and a neighbour is tried instead.
MAX_REPEATS = 3
# When this many trials fail one after the other, it is not the plans.
MAX_FAILURES = 10
# How often it is looked whether what another coordinator evaluates has ended.
WAIT_S = 1.0


def optimise(
    optuna_study: Study,
    profile: Profile,
    executor: AbstractExecutor,
    *,
    objectives: Sequence[Objective],
    limits: ResolvedLimits,
    controls: Sequence[tuple[str, Plan]],
    sampler_name: str,
    seed: int,
    n_trials: int,
    deadline: float | None,
    clock: Callable[[], float],
    callbacks: Callbacks,
    should_stop: Callable[[], bool],
    stop_rule: Callable[[], StopRule] = StopRule,
    n_prices: int | None = None,
    drop_unit: float = REFERENCE_POINT[0],
    weight_errors: Callable[[], WeightErrors] = no_weight_errors,
    seconds_to_end: Callable[[], float] = lambda: 0.0,
) -> None:
    """Tries plans until the study has `n_trials`, time is up, it shall stop, or every plan was tried.

    The executor evaluates as many at a time as it has workers, on terms of which the `stop_rule` is a part.
    First the controls, then a uniform plan and `n_prices` prices (0: neither), then the sampler, which may ask for the
    `weight_errors`, and to which a drop of `drop_unit` is too much. Trials that an earlier process left unfinished come
    before all else. No plan runs twice. A trial after which what ends the study, `seconds_to_end` by the trials so far,
    would not be done before `deadline`, on `clock`, is not started. `n_trials` is the study's total of complete and
    pruned trials; controls and duplicates do not count.

    Raises StudyError for an unknown sampler, a control that is not in the table, or when ten trials in a row fail;
    KeyboardInterrupt, with the running plan queued again, where it comes without `should_stop`, and StorageError in
    the same way where a disk is full.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    setting = SamplerSetting(
        profile=profile, objectives=objectives, limits=limits, seed=seed, drop_unit=drop_unit,
        weight_errors=weight_errors,
    )  # fmt: skip
    next_sampler = make_sampler(sampler_name, setting)
    n_swept = default_n_prices(sampler_name) if n_prices is None else n_prices
    planned = make_seeds(profile, controls, n_swept, seed, objectives)
    with coordinating(optuna_study) as coordination:
        with coordination.asking():
            seeds = fix_seeds(optuna_study, planned)
        search = Search(
            study=optuna_study, coordination=coordination, profile=profile, executor=executor, objectives=objectives,
            limits=limits, sampler_name=sampler_name, next_sampler=next_sampler, seed=seed, n_trials=n_trials,
            deadline=deadline, clock=clock, seconds_to_end=seconds_to_end, callbacks=callbacks, stop_rule=stop_rule,
            should_stop=should_stop, seeds=seeds, history=History([]),
        )  # fmt: skip
        _Loop(search).run()


@final
class _Loop:
    """The trials that are under way, beside what is known of the others."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._running: dict[int, Asked] = {}
        # Those whose plan is being evaluated as another trial: that one's outcome is theirs.
        self._waiting: list[Asked] = []
        # What other coordinators evaluate.
        self._elsewhere: list[TrialRecord] = []
        self._reclaim()
        for record in read_records(search.study):
            if record.state != "running":
                search.history.add(record)
        self._n_repeats = search.history.n_repeats
        self._last = search.history.records[-1].plan if search.history.records else None
        self._n_failures = 0

    def run(self) -> None:
        """Keeps the executor busy until no further trial is to be started."""
        try:
            while self._fill_all():
                if not self._running:
                    time.sleep(WAIT_S)
                for outcome in self.search.executor.wait():
                    self._settle(outcome)
        except BaseException:
            # Whatever ends the loop, no plan that it took is lost.
            for asked in [*self._running.values(), *self._waiting]:
                interrupt(self.search, asked.trial)
            raise

    def _fill_all(self) -> bool:
        """Gives every worker a trial; whether any runs, or waits for one that runs elsewhere."""
        if self.search.coordination.shared and time.monotonic() - self._reclaimed_at > RENEW_EVERY_S:
            self._reclaim()
        while self._fill():
            pass
        return bool(self._running or self._waiting)

    def _fill(self) -> bool:
        """Starts a trial where there is room for one and one is to be started; whether it did, or told a duplicate."""
        with self.search.coordination.asking():
            self._look_around()
            has_room = len(self._running) < self.search.executor.n_workers
            if not has_room or self._finished() or not self._enqueue_next():
                return False
            asked = ask_next(self.search)
            new = asked is not None and self._take(asked)
        if new and asked is not None:
            start(self.search, asked)
        return True

    def _take(self, asked: Asked) -> bool:
        """Whether the trial is to be run: its plan was not tried, and is not being tried."""
        self._last = asked.plan
        known = self.search.history.find(asked.plan)
        new = known is None and not self._is_running(asked.plan)
        self._n_repeats = 0 if new else self._n_repeats + 1
        if new:
            self._running[asked.trial.number] = asked
        elif known is not None:
            self.search.history.add(tell_duplicate(self.search, asked.trial, known))
        else:
            self._waiting.append(asked)
        return new

    def _look_around(self) -> None:
        """What other coordinators have done, and what they do."""
        search = self.search
        if not search.coordination.shared:
            return
        ours = {asked.trial.number for asked in (*self._running.values(), *self._waiting)}
        known = ours | {record.number for record in search.history.records}
        found = read_records(search.study, without=known)
        self._elsewhere = [record for record in found if record.state == "running"]
        for record in found:
            if record.state != "running":
                search.history.add(record)
                search.callbacks.trial_seen(record)
        for asked in [asked for asked in self._waiting if search.history.find(asked.plan) is not None]:
            self._waiting.remove(asked)
            self._take(asked)

    def _reclaim(self) -> None:
        """Takes over what nobody evaluates any more."""
        self._reclaimed_at = time.monotonic()
        lost = set(self.search.coordination.reclaim())
        for record in read_records(self.search.study) if lost else []:
            if record.number in lost:
                self.search.callbacks.trial_failed(record)

    def _settle(self, outcome: Outcome) -> None:
        asked = self._running.pop(outcome.number)
        record = settle(self.search, asked.trial, outcome)
        self.search.history.add(record)
        for other in [other for other in self._waiting if other.plan.hash() == record.plan_hash]:
            self._waiting.remove(other)
            told = interrupt if record.queued_again else partial(tell_duplicate, known=record)
            self.search.history.add(told(self.search, other.trial))
        if record.queued_again:
            if outcome.interrupted and not self.search.should_stop():
                raise KeyboardInterrupt if outcome.reason is None else StorageError(f"{outcome.reason}{GO_ON}")
            return
        self._n_failures = self._n_failures + 1 if record.state == "failed" else 0
        if self._n_failures >= MAX_FAILURES:
            raise StudyError(
                f"the last {self._n_failures} trials failed, so the study stops; the last one: {record.reason}"
            )

    def _is_tried(self, plan: Plan) -> bool:
        return self.search.history.find(plan) is not None or self._is_running(plan)

    def _is_running(self, plan: Plan) -> bool:
        return any(other.plan.hash() == plan.hash() for other in self._under_way())

    def _under_way(self) -> list[Asked | TrialRecord]:
        """What is evaluated, here and elsewhere."""
        return [*self._running.values(), *self._elsewhere]

    def _finished(self) -> bool:
        """Whether no further trial is to be started, if those that run end well."""
        search, running = self.search, self._under_way()
        if search.should_stop() or search.history.n_distinct + len(running) >= n_plans(search.profile):
            return True
        if search.deadline is not None:
            ahead_s = search.history.mean_seconds + search.seconds_to_end()
            if search.clock() + ahead_s >= search.deadline:
                return True
        n_counted = search.history.n_counted + sum(not asked.control for asked in running)
        if n_counted < search.n_trials:
            return False
        tried = {record.plan_hash for record in search.history.records if not record.queued_again}
        tried |= {asked.plan.hash() for asked in running}
        controls = [search.profile.plan(seed.indices).hash() for seed in search.seeds if seed.control]
        return all(control in tried for control in controls)

    def _enqueue_next(self) -> bool:
        """Queues what comes before the sampler's turn; False where no plan is left to try.

        What is queued already, such as a retry, comes first; then the seeds in order; then, where the sampler only
        repeats itself, a neighbour of what it asked for last.
        """
        search = self.search
        trials = search.study.get_trials(deepcopy=False)
        if any(trial.state is TrialState.WAITING for trial in trials):
            return True
        asked = {trial.user_attrs["seed"] for trial in trials if "seed" in trial.user_attrs}
        planned = next_seed(search.seeds, asked)
        if planned is not None:
            number, seed = planned
            params = to_params(search.profile, seed.indices)
            enqueue(search.study, params, origin=seed.origin, control=seed.control, seed=number)
            return True
        if self._n_repeats < MAX_REPEATS or self._last is None:
            return True
        last = search.profile.indices(self._last)
        n_tried = search.history.n_distinct + len(self._under_way())
        params_near = neighbour(search.profile, last, self._is_tried, n_tried, search.seed, len(trials))
        if params_near is not None:
            enqueue(search.study, params_near, origin="neighbour")
        return params_near is not None
