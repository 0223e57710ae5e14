"""Goals in the user's words, and study scripts that do not load."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ranksearch.errors import StudyError
from ranksearch.goals import Limit, parse_drop, parse_latency, parse_size
from ranksearch.recovery_settings import Recovery
from ranksearch.scores import nll_per_token, perplexity
from ranksearch.spec import CorpusScore, Goals, Space, StudySpec, Target, corpus_score, load_study

SCRIPT = """
import ranksearch.spec as rs

def unused(*_): ...

study = rs.StudySpec(name="tiny", model=unused, data=unused, loss=unused, score=unused)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(text: str) -> Path:
        file = tmp_path / "my_study.py"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    ("parse", "text", "value", "kind"),
    [
        (parse_drop, "1%", 0.01, "absolute"),
        (parse_drop, " 0.5 % ", 0.005, "absolute"),
        (parse_drop, "2%rel", 0.02, "relative"),
        (parse_drop, "0.03", 0.03, "absolute"),
        (parse_drop, 0.03, 0.03, "absolute"),
        (parse_drop, 0, 0.0, "absolute"),
        (parse_latency, "5ms", 5.0, "ms"),
        (parse_latency, "250us", 0.25, "ms"),
        (parse_latency, "1.5 s", 1500.0, "ms"),
        (parse_latency, ".5x", 0.5, "ratio"),
        (parse_size, "2MB", 2e6, "bytes"),
        (parse_size, "2MiB", 2 * 2**20, "bytes"),
        (parse_size, "100 kB", 1e5, "bytes"),
        (parse_size, "25%", 0.25, "ratio"),
        (parse_size, "0.25x", 0.25, "ratio"),
    ],
)
def test_goals_are_read(parse: Callable[[Any], Limit], text: str | float, value: float, kind: str) -> None:
    limit = parse(text)
    assert limit.value == pytest.approx(value)
    assert limit.kind == kind


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        ({"max_drop": "a little"}, "max_drop 'a little' cannot be read"),
        ({"max_drop": "-1%"}, "max_drop '-1%'"),
        ({"max_drop": -0.01}, "from 0 up"),
        ({"max_drop": math.nan}, "from 0 up"),
        ({"max_latency": "5"}, "write '5ms' or '0.5x'"),
        ({"max_latency": 5}, "max_latency 5"),
        ({"max_latency": "5 MB"}, "max_latency"),
        ({"max_size": "2"}, "write '2MB' or '25%'"),
        ({"max_size": "2mb"}, "max_size '2mb'"),
    ],
)
def test_goals_that_cannot_be_read_say_how_to_write_them(goals: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Goals(**goals)


def test_limits_by_objective_resolve_against_dense() -> None:
    limits = Goals(max_drop="1%rel", max_latency="0.5x", max_size="2MB").limits()
    assert limits["drop"].resolve(0.9) == pytest.approx(0.009)
    assert limits["latency"].resolve(8.0) == pytest.approx(4.0)
    assert limits["bytes"].resolve(1e7) == pytest.approx(2e6)
    assert Goals().limits() == {}
    assert list(Goals(max_size="25%").limits()) == ["bytes"]


def test_lists_become_tuples_and_a_bare_string_is_refused() -> None:
    assert Space(skip=["conv1"]).skip == ("conv1",)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=r"write \['conv1'\]"):
        Space(skip="conv1")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="rank_multiple is 0"):
        Space(rank_multiple=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": [3]}, r"Space.weight_bits is \(3,\); choose out of \(32, 16, 8, 4\)"),
        ({"weight_bits": (32, 2)}, "Space.weight_bits"),
        ({"weight_bits": ()}, "choose out of"),
        ({"weight_bits": 8}, r"write \[8\]"),
        ({"decompositions": ()}, "name at least 'none'"),
    ],
)
def test_a_space_holds_only_what_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Space(**settings)
    assert Space(weight_bits=[8]).weight_bits == (8,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "Target.batch_size is 0; it must be a whole number from 1 up"),
        ({"batch_size": 1.5}, "Target.batch_size is 1.5"),
        ({"threads": 0}, "Target.threads is 0"),
        ({"precision": ""}, "Target.precision is ''; write 'f32'"),
        ({"precision": 32}, "Target.precision is 32; write 'f32'"),
    ],
)
def test_a_target_refuses_what_no_runtime_can_take(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Target(**settings)
    assert Target(threads=None, batch_size=32).threads is None


@pytest.mark.parametrize("settings", [{"epochs": -1.0}, {"steps": -1}, {"learning_rate": 0.0}, {"seconds": -1.0}])
def test_recovery_refuses_senseless_budgets(settings: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match="must (not be negative|be positive)"):
        Recovery(**settings)


def test_recovery_names_what_it_does_not_know() -> None:
    with pytest.raises(
        StudyError, match="optimizer='adam' must be sgd or adamw; schedule='linear' must be one_cycle or"
    ):
        Recovery(optimizer="adam", schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="distillation=2 must be a share from 0 to 1"):
        Recovery(distillation=2)
    assert Recovery().epochs == 1.0 and Recovery(steps=3).epochs is None and Recovery(seconds=3).epochs is None


def study_with(**changes: Any) -> StudySpec:
    def unused(*_: Any) -> Any: ...

    return StudySpec(**{"name": "s", "model": unused, "data": unused, "loss": unused, "score": unused, **changes})


UNFIT_NAMES = {
    "": "letters", "..": "letters", ".hidden": "letters", "a/b": "letters", "../up": "letters", "/root": "letters",
    " leading": "space", "trailing ": "space", "-o": "letters", "it's": "letters", 'a"b': "letters", "a\n": "letters",
    "a\\b": "letters", "$HOME": "letters", "a\u2028b": "letters", "\u200d": "letters", None: "letters", 5: "letters",
    "ü" * 101: "202 bytes; use 200", "digits.old-1": "--new moves aside",
}  # fmt: skip


@pytest.mark.parametrize(("name", "told"), UNFIT_NAMES.items(), ids=repr)
def test_study_names_must_be_fit_for_files(name: Any, told: str) -> None:
    with pytest.raises(StudyError, match=f"study name .*({told})"):
        study_with(name=name)


@pytest.mark.parametrize("name", ["a", "ResNet-20 v1.0", "größe_2", "日本", "📦 small", "👩\u200d💻", "ü" * 100])
def test_study_names_may_be_in_any_script(name: str) -> None:
    assert study_with(name=name).name == name


@pytest.mark.parametrize("objectives", [("drop",), ("drop", "speed"), ("drop", "drop"), ()])
def test_objectives_are_two_or_three_known_ones(objectives: tuple[str, ...]) -> None:
    with pytest.raises(StudyError, match="two or three"):
        study_with(objectives=objectives)


def test_a_study_with_defaults() -> None:
    study = study_with(objectives=["drop", "latency"], name="ResNet-20 v1.0")
    assert study.objectives == ("drop", "latency")
    assert study.target.runtime == "openvino"


@pytest.mark.parametrize("score", [perplexity, nll_per_token], ids=["perplexity", "nll_per_token"])
def test_a_score_of_which_lower_is_better_must_be_called_so(score: Any) -> None:
    with pytest.raises(StudyError, match="higher_is_better=False"):
        study_with(score=score)
    assert not study_with(score=score, higher_is_better=False).higher_is_better


def test_a_score_may_be_of_the_corpus() -> None:
    score = corpus_score(lambda outputs, targets: 0.5)
    assert isinstance(score, CorpusScore)
    assert score.function(None, None) == 0.5


def test_a_script_gives_its_study(script: Callable[[str], Path]) -> None:
    assert load_study(script(SCRIPT)).name == "tiny"


def test_a_script_may_import_its_neighbours_even_late(script: Callable[[str], Path]) -> None:
    late = "def model():\n    import my_neighbour\n    return my_neighbour.VALUE\n"
    file = script(SCRIPT.replace("def unused", late + "def unused").replace("model=unused", "model=model"))
    (file.parent / "my_neighbour.py").write_text("VALUE = 7\n")
    assert load_study(file).model() == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "no `study`"),
        ("study = 3\n", "`study` is a int"),
        ("x = 1\ny = 1 / 0\n", r"line 2: ZeroDivisionError"),
        ("x = (\n", r"line 1: SyntaxError"),
        ("import does_not_exist_at_all\n", "line 1: ModuleNotFoundError"),
        ("import ranksearch.spec as rs\nrs.Goals(max_size='big')\n", "max_size 'big' cannot be read"),
    ],
)
def test_a_script_that_does_not_load_says_where(script: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(script(text))


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no study script .*nowhere\.py"):
        load_study(tmp_path / "nowhere.py")
    (tmp_path / "study.txt").write_text("")
    with pytest.raises(StudyError, match="is not a Python file"):
        load_study(tmp_path / "study.txt")
