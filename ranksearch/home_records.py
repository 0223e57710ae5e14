"""What a study's home holds, checked as it is read: it may be a stranger's, damaged, or mended by hand."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.home import StudyHome, read_json
from ranksearch.reading import MAX_TABLE_BYTES, read_own_text, shown
from ranksearch.spec import Objective, Target

Row = dict[str, Any]

# No measurement gives more, and what is computed of these stays finite.
Whole = Annotated[int, Field(ge=-(2**62), le=2**62)]
Figure = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
# Scores may be NaN.
Cell = Whole | float | None


class _Record(BaseModel):
    """What is read of a record; what else it holds is left alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class _Model(_Record):
    name: str
    n_params: Whole
    macs: Whole
    n_layers: Whole


class _Data(_Record):
    calibration: Whole
    validation: Whole


class _Target(_Record):
    model_config = ConfigDict(extra="forbid")

    runtime: str = ""
    device: str = ""
    batch_size: Annotated[int, Field(ge=1, le=2**31)] = 1
    precision: str = ""
    mode: str = ""
    threads: Annotated[int, Field(ge=1)] | None = None
    cores: str | None = None


class _Study(_Record):
    """`study.json`."""

    name: str
    objectives: Annotated[list[Objective], Field(min_length=2, max_length=3)]
    dense_accuracy: Figure
    dense_latency_ms: Positive
    dense_bytes: Annotated[int, Field(gt=0, le=2**62)]
    noise_floor: Figure
    target: _Target
    fingerprint: dict[str, str]
    seed: Whole | None = None
    uid: str = ""
    script: str | None = None
    skipped: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    last_run: dict[str, str] = Field(default_factory=dict)
    model: _Model | None = None
    data: _Data | None = None


class _Figures(_Record):
    """A plan of `remeasured.json`."""

    __pydantic_extra__: dict[str, Cell] = Field(init=False)
    latency_ms: Positive = 1.0
    latency_p95_ms: Positive = 1.0
    latency_ratio: Positive = 1.0
    ratio_low: Figure = 1.0
    ratio_high: Figure = 1.0


class _Row(_Record):
    """A row of `controls.json` or `full.json`, in the front's columns; latency and size are there, or neither is."""

    __pydantic_extra__: dict[str, Cell] = Field(init=False)
    origin: str
    summary: str | None = None
    run_id: str | None = None
    rung: str | None = None
    pareto: bool | None = None
    feasible: bool | None = None
    surely_feasible: bool | None = None
    latency_ms: Positive | None = None
    latency_ratio: Positive | None = None
    model_bytes: Whole | None = None
    bytes_ratio: Positive | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        figures = (self.latency_ms, self.latency_ratio, self.model_bytes, self.bytes_ratio)
        if None in figures and any(figure is not None for figure in figures):
            raise ValueError("latency and size are there in part")
        return self


class _Controls(_Record):
    controls: list[_Row] = Field(default_factory=list)


_FIGURES, _FULL = TypeAdapter(dict[str, _Figures]), TypeAdapter(dict[str, _Row])


def study_record(home: StudyHome) -> dict[str, Any]:
    """How the study began; {} where it has not. Raises StudyError where the record is damaged."""
    record = _checked(home.study, _Study.model_validate)
    return record and {**record, "target": asdict(Target(**record["target"]))}


def figures_again(home: StudyHome) -> dict[str, dict[str, float | None]]:
    """What was measured again of plans, by their hashes. Raises StudyError where the record is damaged."""
    return _checked(home.remeasured, _FIGURES.validate_python)


def control_records(home: StudyHome) -> list[Row]:
    """The records beside the trials, as rows of the front. Raises StudyError where they are damaged."""
    return list(_checked(home.controls, _Controls.model_validate).get("controls", []))


def full_records(home: StudyHome) -> list[Row]:
    """The plans that were trained in full, as rows of the front. Raises StudyError where they are damaged."""
    return list(_checked(home.full, _FULL.validate_python).values())


def read_profile(home: StudyHome) -> Profile:
    """The study's candidate table. Raises StudyError where it is missing or damaged."""
    try:
        text = read_own_text(home.candidates, MAX_TABLE_BYTES)
    except (OSError, ValueError) as error:
        raise StudyError(f"{home.candidates} cannot be read: {error}; restore it, or start over with --new") from None
    return Profile.from_json(text, source=str(home.candidates))


def _checked(path: Path, check: Callable[[Any], object]) -> dict[str, Any]:
    """The record as it is written, once it is known to be sound; {} where there is none."""
    content = read_json(path)
    try:
        if content or path.exists():
            check(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = shown(".".join(str(part) for part in problem["loc"]))
        raise StudyError(
            f"{path} is damaged: {place}: {problem['msg']}; restore it, or start over with --new"
        ) from None
    return content
