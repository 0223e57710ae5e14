"""What a user can mend is one sentence on stderr that says what, where, and what would do; exit code 2."""

import json
from pathlib import Path

import pytest
from command_line import Commands, Ended, Searched, write_study


def assert_one_sentence(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.err + ended.out
    for part in parts:
        assert part in ended.err, ended.err


RUNTIME = """
from ranksearch.runtimes import RUNTIMES, AbstractRuntime


class Elsewhere(AbstractRuntime):
    name = "elsewhere"
    module = "a_module_that_nobody_has"
    extra = "onnxruntime"
    check = supported_bits = options = fingerprint = prepare = serialise = open = lambda *arguments: None


rs.register_runtime(Elsewhere())
study = __import__("dataclasses").replace(study, target=rs.Target(runtime="elsewhere"))
"""

NETWORK = "return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))"

NOISE = """class Noise:
    def __iter__(self):
        yield torch.rand(32, 3, 8, 8), labels[:32]


def load_data"""

BAD_STUDIES = {
    "no layers": ([(NETWORK, "return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())")], "", ["compress"]),
    "no calibration data": ([("calibration=batches[:2]", "calibration=[]")], "", ["calibration", "yields nothing"]),
    "no validation data": ([("validation=batches[2:5]", "validation=[]")], "", ["validation", "yields no"]),
    "no test data": ([("test=batches[5:]", "test=[]")], "", ["test", "yields no"]),
    "no training data": ([("test=batches[5:]", "train=[]")], "", ["train", "yields no"]),
    "passes that differ": (
        [("validation=batches[2:5]", "validation=Noise()"), ("def load_data", NOISE)], "", ["validation"],
    ),
    "NaN loss": ([("loss=F.cross_entropy", "loss=lambda o, t: o.sum() * float('nan')")], "", ["loss", "nan"]),
    "score of a wrong shape": ([("score=rs.top1", "score=lambda o, t: o")], "", ["score", "32, 4"]),
    "unknown runtime": ([('runtime="openvino"', 'runtime="abacus"')], "", ["abacus", "openvino", "torch"]),
    "runtime not installed": ([], RUNTIME, ["a_module_that_nobody_has", "pip install 'ranksearch[onnxruntime]'"]),
    "glob that matches nothing": ([("recovery=", "space=rs.Space(skip=['x*']),\n    recovery=")], "", ["'x*'"]),
    "goal that cannot be read": ([('max_drop="60%"', 'max_drop="a bit"')], "", ["'a bit'", "1%"]),
    "model that raises": ([("    torch.manual_seed(0)", "    open('no.pt')")], "", ["study.py, line", "no.pt"]),
    "unknown decomposition": (
        [("recovery=", "space=rs.Space(decompositions=['qr']),\n    recovery=")], "", ["'qr'", "svd"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_STUDIES))
def test_a_study_that_cannot_be_used(commands: Commands, tmp_path: Path, name: str) -> None:
    changes, after, parts = BAD_STUDIES[name]
    write_study(tmp_path, *changes, after=after)
    assert_one_sentence(commands.run(tmp_path, "run", "study.py", "--trials", "1"), *parts)
    assert not list(tmp_path.glob(".ranksearch/*/study.json"))


def test_a_script_that_cannot_be_used(commands: Commands, tmp_path: Path) -> None:
    assert_one_sentence(commands.run(tmp_path, "run", "nowhere.py"), "there is no study script nowhere.py")
    script = tmp_path / "script.py"
    script.write_text("import ranksearch\n1 / 0\n", encoding="utf-8")
    assert_one_sentence(commands.run(tmp_path, "check", script), "script.py does not import", "line 2", "division")
    script.write_text("def broken(:\n", encoding="utf-8")
    assert_one_sentence(commands.run(tmp_path, "run", script), "line 1", "SyntaxError")
    script.write_text("x = 1\n", encoding="utf-8")
    assert_one_sentence(commands.run(tmp_path, "profile", script), "no `study`", "rs.StudySpec(")


def test_an_error_in_what_the_study_imports_is_told_with_its_line(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "my_network.py").write_text("def load():\n    raise LookupError('x' * 9000)\n", encoding="utf-8")
    script = write_study(
        tmp_path,
        (
            "    torch.manual_seed(0)",
            "    import sys\n    sys.path.insert(0, '.')\n    import my_network\n    my_network.load()",
        ),
    )
    ended = commands.run(tmp_path, "check", script)
    assert_one_sentence(ended, "my_network.py, line 2: LookupError: xxx", "xxx ...")
    assert len(ended.err) < 2100


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--max-drop", "one"], ["max_drop 'one'", "1%"]),
        (["--max-latency", "5"], ["max_latency '5'", "5ms"]),
        (["--max-size", "2 potatoes"], ["max_size", "2MB"]),
        (["--time", "soon"], ["--time 'soon'", "30m"]),
        (["--time", "0"], ["time limit of 0 s", "no time for a trial"]),
        (["--grace", "x"], ["--grace 'x'"]),
        (["--sampler", "dice"], ["'dice'", "nsga2"]),
        (["--trials", "1", "--more-trials", "1"], ["--trials", "--more-trials"]),
        (["--name", "a/b"], ["study name 'a/b'"]),
        (["--storage", "nosql://nowhere"], ["nosql://nowhere"]),
        (["--tracking-uri", "./runs"], ["./runs", "sqlite:///mlflow.db"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used(commands: Commands, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    write_study(tmp_path)
    assert_one_sentence(commands.run(tmp_path, "run", "study.py", *options), *parts)


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ({"schema": 1, "layers": {}, "colour": "red"}, ["plan.json", "unknown key 'colour'"]),
        ({"schema": 1, "layers": {"9": {"decomposition": "svd", "ranks": [8]}}}, ["'9'"]),
        ({"schema": 1, "layers": {"2": {"decomposition": "svd", "ranks": [999]}}}, ["'2'", "999"]),
        ({"schema": 1, "layers": {"2": {"decomposition": "qr", "ranks": [1]}}}, ["qr", "svd"]),
        ({"schema": 7, "layers": {}}, ["schema", "7"]),
        ([], ["plan.json"]),
    ],
    ids=["unknown key", "unknown layer", "rank", "unknown decomposition", "schema", "no object"],
)
def test_a_plan_that_cannot_be_used(commands: Commands, tmp_path: Path, plan: object, parts: list[str]) -> None:
    write_study(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert_one_sentence(commands.run(tmp_path, "evaluate", "study.py", "plan.json"), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["front", "--study", "other"], ["no study 'other'", "tiny"]),
        (["front", "--format", "xml"], ["'xml'", "parquet"]),
        (["show", "--trial", "99"], ["no trial 99"]),
        (["export", "-o", "x", "--trial", "99"], ["no trial 99", "front --all"]),
        (["export", "-o", "x", "--run-id", "none"], ["no MLflow run none"]),
        (["export", "-o", "x", "--minimize", "colour"], ["'colour'", "latency"]),
        (["export", "-o", "x", "--max-drop", "?"], ["max_drop '?'"]),
        (["ui", "--tracking-uri", "sqlite:///nowhere.db"], ["no run of study 'tiny'", "nowhere.db"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_reading_what_is_not_there(
    commands: Commands, searched: Searched, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    assert_one_sentence(commands.run(tmp_path, *words, "--home", searched.home), *parts)


def test_verify_needs_an_export(commands: Commands, tmp_path: Path) -> None:
    assert_one_sentence(commands.run(tmp_path, "verify", "nowhere"), "no export folder nowhere")
    assert_one_sentence(commands.run(tmp_path, "front"), "no study in .ranksearch")
