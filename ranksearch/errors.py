"""What can go wrong, for those who want to catch it.

RankSearchError
├── PlanError                 a plan that cannot be read, or does not fit the model
├── DecompositionError        a layer that cannot be factored as asked
├── RuntimeUnavailableError   a runtime that is unknown or not installed
├── MeasurementError          a latency or a score that could not be measured
├── StudyError                a study script, its data or its goals that cannot be used
├── StorageError              a disk or a database that takes nothing more while a study runs
└── NoPlanError               goals that no plan of the study meets
"""


class RankSearchError(Exception):
    """Any failure that a user can mend; its message is one sentence that says what, where, and what would do."""


class PlanError(RankSearchError):
    """A plan that cannot be read, or does not fit the model."""


class DecompositionError(RankSearchError):
    """A layer that cannot be factored as asked."""


class RuntimeUnavailableError(RankSearchError):
    """A runtime that is unknown or not installed."""


class MeasurementError(RankSearchError):
    """A latency or a score that could not be measured."""


class StudyError(RankSearchError):
    """A study script, its data or its goals that cannot be used."""


class StorageError(RankSearchError):
    """A disk or a database that takes nothing more; what was finished is kept, and the same command goes on."""


class NoPlanError(RankSearchError):
    """Goals that no plan of the study meets."""
