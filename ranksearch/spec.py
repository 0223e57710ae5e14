"""What a study script fills in: values only."""

import fnmatch
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ranksearch.errors import StudyError
from ranksearch.goals import Limit, parse_drop, parse_latency, parse_size
from ranksearch.recovery_settings import Recovery

Batches = Iterable[tuple[Any, Any]]
Objective = Literal["drop", "latency", "bytes"]
OBJECTIVES: tuple[Objective, ...] = ("drop", "latency", "bytes")
WEIGHT_BITS = (32, 16, 8, 4)
# Of a file's 255, the rest for ends such as `-front.parquet`.
MAX_NAME_BYTES = 200
MOVED_ASIDE = re.compile(r"\.old-\d+$")
# Of ASCII what a path, a shell and MLflow's filters take as it is.
_NAME = re.compile(r"(?![.\- \u200d])[\w.\- \u0080-\U0010ffff]+(?<! )")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Re-iterables of (inputs, targets) batches.

    Validation, tiebreak and test give the same examples in the same order at every pass; calibration and train may
    shuffle and augment. Without `train` recovery uses the calibration data; without `test` the report says so.
    `tiebreak` are more examples for validation, none of them among `validation`: only plans of the front, and those
    that validation can barely tell from it, are scored on them, when the search ends.
    """

    calibration: Batches
    validation: Batches
    train: Batches | None = None
    test: Batches | None = None
    tiebreak: Batches | None = None

    @property
    def recovery(self) -> Batches:
        """What recovery trains on."""
        return self.calibration if self.train is None else self.train


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where the model must run. `threads=None` means all cores; precision `default` is the runtime's own choice.

    `cores`, as in `0-3,8`, are the cores of the host that it is timed on, and nothing else of the study runs on them
    where there are others; None leaves it to the system. Raises StudyError for what cannot be a target anywhere.
    """

    runtime: str = "openvino"
    mode: str = "eager"
    device: str = "cpu"
    batch_size: int = 1
    threads: int | None = None
    precision: str = "f32"
    cores: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("threads", self.threads)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise StudyError(f"Target.{name} is {value!r}; it must be a whole number from 1 up")
        if not isinstance(self.precision, str) or not self.precision:
            # Which there are, each runtime knows for itself: users may register their own.
            raise StudyError(
                f"Target.precision is {self.precision!r}; write 'f32', 'default' or another of the runtime's"
            )
        n_cores = len(self.core_numbers())
        if self.cores is not None and self.threads is not None and self.threads > n_cores:
            raise StudyError(
                f"Target.threads is {self.threads}, and Target.cores {self.cores!r} are {n_cores}: "
                "name as many cores as threads, or ask for fewer threads"
            )

    def __repr__(self) -> str:
        # Enters the keys of studies and caches: those of a target that names no cores stay what they were before.
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cores" or self.cores is not None}
        return f"Target({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def core_numbers(self) -> frozenset[int]:
        """The numbers of `cores`; none where it is None. Raises StudyError where they cannot be read."""
        if self.cores is None:
            return frozenset()
        ranges = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip()) for part in str(self.cores).split(",")]
        bounds = [(int(found[1]), int(found[2] or found[1])) for found in ranges if found]
        if not isinstance(self.cores, str) or not all(ranges) or any(first > last for first, last in bounds):
            raise StudyError(f"Target.cores is {self.cores!r}; write numbers and ranges of cores, such as '0-3,8'")
        return frozenset(core for first, last in bounds for core in range(first, last + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Goals:
    """What the user demands, in the user's words: `1%` or `1%rel`; `5ms` or `0.5x`; `2MB` or `25%`.

    Raises StudyError for a goal that cannot be parsed.
    """

    max_drop: str | float | None = None
    max_latency: str | None = None
    max_size: str | None = None

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> dict[Objective, Limit]:
        """The goals that are set, parsed, by the objective that they bound."""
        limits: dict[Objective, Limit] = {}
        if self.max_drop is not None:
            limits["drop"] = parse_drop(self.max_drop)
        if self.max_latency is not None:
            limits["latency"] = parse_latency(self.max_latency)
        if self.max_size is not None:
            limits["bytes"] = parse_size(self.max_size)
        return limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What may be chosen. `only` and `skip` are globs on layer names; ranks are multiples of `rank_multiple`.

    None takes the multiple that the target's kernels compute in, which is measured. `weight_bits` are some of 32, 16,
    8 and 4; bits that no kernel of the target runs are offered for storage only, where size is an objective.
    `ties` are groups of globs whose layers share their bits, since the runtime fuses them:
    `[["*.q_proj", "*.k_proj", "*.v_proj"]]` ties those three in every block, the modules of one parent together.

    Raises StudyError for what cannot be chosen from.
    """

    decompositions: tuple[str, ...] = (
        "none",
        "svd",
        "spatial_svd",
        "tucker2",
        "cp",
        "tensor_train",
        "depthwise_separable",
        "blueprint_separable",
        "grouped_svd",
        "harmonic",
    )
    weight_bits: tuple[int, ...] = (32, 8)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rank_multiple: int | None = None
    ties: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if any(isinstance(group, str) for group in self.ties):
            raise StudyError(f"Space.ties is {self.ties!r}; write groups of globs: [['*.query', '*.key', '*.value']]")
        object.__setattr__(self, "ties", tuple(tuple(group) for group in self.ties))
        # Study scripts write lists; frozen values hold tuples.
        for name in ("decompositions", "weight_bits", "only", "skip"):
            value = getattr(self, name)
            if isinstance(value, str | int):
                raise StudyError(f"Space.{name} is {value!r}; write [{value!r}]")
            object.__setattr__(self, name, tuple(value))
        unknown = [bits for bits in self.weight_bits if bits not in WEIGHT_BITS]
        if unknown or not self.weight_bits:
            raise StudyError(f"Space.weight_bits is {self.weight_bits}; choose out of {WEIGHT_BITS}")
        if not self.decompositions:
            raise StudyError("Space.decompositions is empty; name at least 'none'")
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise StudyError(f"Space.rank_multiple is {self.rank_multiple}; it must be at least 1")


def tied_layers(
    ties: Sequence[Sequence[str]], names: Sequence[str], skipped: Collection[str] = ()
) -> tuple[tuple[str, ...], ...]:
    """The layers that share their bits, by tie: those of one parent that a group's globs match, where they are several.

    Raises StudyError for a glob that matches none of them and none that is skipped, and for a layer in two ties.
    """
    found: list[tuple[str, ...]] = []
    for group in ties:
        for glob in group:
            if not fnmatch.filter([*names, *skipped], glob):
                raise StudyError(f"Space.ties: the glob {glob!r} matches no layer; layers are {', '.join(names)}")
        by_parent: dict[str, list[str]] = {}
        for name in names:
            if any(fnmatch.fnmatch(name, glob) for glob in group):
                by_parent.setdefault(name.rpartition(".")[0], []).append(name)
        found += [tuple(tied) for tied in by_parent.values() if len(tied) > 1]
    counts = Counter(name for tied in found for name in tied)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise StudyError(f"Space.ties: layer {twice[0]!r} is in two ties; name it in one")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """A score over all outputs and targets at once, or over what `reduce` leaves of each batch of them."""

    function: Callable[[Any, Any], float]
    reduce: Callable[[Any, Any], tuple[Any, Any]] | None = None
    lower_is_better: bool = False


def corpus_score(
    function: Callable[[Any, Any], float],
    reduce: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    *,
    lower_is_better: bool = False,
) -> CorpusScore:
    """Marks `function(all outputs, all targets) -> float` as a score of the whole data set.

    `reduce` (outputs, targets) -> (outputs, targets) goes over each batch first, and only what it gives is kept: less
    of each example, as its loss instead of its logits, or one row for several, as the cosine of two sentences. The
    interval is by bootstrap over the rows that it gives. A score that is `lower_is_better` is refused by a study that
    takes it for the other kind.
    """
    return CorpusScore(function, reduce, lower_is_better)


Score = Callable[..., Any] | CorpusScore


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySpec:
    """A study: the model, its data, its loss and score, where it must run, and what is demanded.

    `model` is () -> trained nn.Module; `data` is () -> Data; `loss` is (outputs, targets) -> mean over the batch;
    `score` is a per-example function (outputs, targets) -> one number per example, or corpus_score(..), or
    evaluate(model) -> float.
    """

    name: str
    model: Callable[[], Any]
    data: Callable[[], Data]
    loss: Callable[[Any, Any], Any]
    score: Score
    higher_is_better: bool = True
    target: Target = field(default_factory=Target)
    goals: Goals = field(default_factory=Goals)
    space: Space = field(default_factory=Space)
    recovery: Recovery = field(default_factory=Recovery)
    objectives: tuple[Objective, ...] = OBJECTIVES
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        _check_name(self.name)
        if self.higher_is_better and getattr(self.score, "lower_is_better", False):
            raise StudyError(f"study {self.name!r}: of its score lower is better: give higher_is_better=False")
        unknown = [o for o in self.objectives if o not in OBJECTIVES]
        if unknown or len(self.objectives) < 2 or len(set(self.objectives)) != len(self.objectives):
            raise StudyError(f"objectives {self.objectives} must be two or three different ones out of {OBJECTIVES}")


def _check_name(name: object) -> None:
    """Raises StudyError for what cannot be at once a folder, an experiment of MLflow and a word on the command line."""
    # The joiner cannot be seen, but makes one emoji of several.
    if not (isinstance(name, str) and _NAME.fullmatch(name) and name.replace("\u200d", "").isprintable()):
        raise StudyError(
            f"study name {name!r}: use letters, digits, '_', '-', '.', spaces and emoji, neither '-' nor '.' first and "
            "no space at either end"
        )
    n_bytes = len(name.encode())
    if n_bytes > MAX_NAME_BYTES:
        raise StudyError(f"study name '{name[:20]}...' has {n_bytes} bytes; use {MAX_NAME_BYTES} at most")
    if MOVED_ASIDE.search(name):
        raise StudyError(f"study name {name!r}: what --new moves aside ends like that; use another end")


def load_study(path: str | Path) -> StudySpec:
    """Imports a study script and gives its `study`.

    Raises StudyError where the file does not exist, does not import, or has no `study`.
    """
    file = Path(path)
    if not file.is_file():
        raise StudyError(f"there is no study script {path}")
    module_name = f"ranksearch_study_{file.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    if module_spec is None or module_spec.loader is None:
        raise StudyError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    directory = str(file.resolve().parent)
    if directory not in sys.path:
        # A script may import its neighbours, as with `python FILE`; also later, inside its functions: it stays.
        sys.path.insert(0, directory)
    try:
        module_spec.loader.exec_module(module)
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(f"{path} does not import: {_where(error, file)}{type(error).__name__}: {error}") from error
    study = getattr(module, "study", None)
    if not isinstance(study, StudySpec):
        found = "no `study`" if study is None else f"`study` is a {type(study).__name__}"
        raise StudyError(f"{path}: {found}; it must end with `study = rs.StudySpec(...)`")
    return study


def _where(error: BaseException, file: Path) -> str:
    """The deepest line of `file` in the error's traceback: `line 12: `."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines = []
    step = error.__traceback__
    while step is not None:
        if Path(step.tb_frame.f_code.co_filename).resolve() == file.resolve():
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f"line {lines[-1]}: " if lines else ""
