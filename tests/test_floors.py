"""The house: imports go down, heavy libraries stay in their rooms, no function bears a module's name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ranksearch"

# A room is a top-level module or package. A new one gets its floor here, in the same change; a room between two
# floors of the design stands on a landing (a half).
FLOORS: dict[str, float] = {
    "disk": 0.5, "errors": 0, "goals": 0.5, "intervals": 0, "masking": 0, "memory": 0, "pace": 0, "pareto": 0,
    "reading": 0, "recovery_settings": 0.5, "retention": 0, "versions": 0,
    "batches": 1.5, "cache": 1, "evaluation": 1.5, "exposing": 1.5, "factored": 1, "figures": 1, "finding": 1.25,
    "inputs": 1.5, "latency_model": 1, "layers": 1, "loss_model": 1, "memory_format": 1.5, "plan": 1, "replaying": 1.5,
    "scores": 1.5, "spec": 1, "surgery": 1, "trees": 1, "trial_facts": 1.5, "turns": 1,
    "candidates": 2, "early_stopping": 2, "decompositions": 2, "device": 2, "home": 2, "load_example": 2, "machine": 2,
    "quantization": 2, "scoring": 2, "statistics": 2,
    "factorisations": 2.5, "home_records": 2.5, "refit": 2.5, "rounding": 2.5, "weights": 2.5,
    "compression": 3, "runtimes": 3,
    "bits": 3.5,
    "latency": 3.5, "recovery": 4, "preparation": 4.25, "study_checks": 4.25, "progressive": 4.25, "workbench": 4.35,
    "identity": 5, "layer_timing": 4.5, "loss_meter": 4.5, "staircase": 4.75, "profiling": 5,
    "ladder": 6,
    "export": 6.5, "executors": 6.75,
    "optimization": 7, "portable": 7, "remeasure": 7,
    "export_record": 7.5,
    "controls": 8, "folder_latency": 8, "results": 8, "tracking": 8, "verification": 8,
    "reports": 8.25,
    "resuming": 8.5, "search_result": 8.5, "session": 8.5,
    "study_export": 8.6, "study_report": 8.6, "trial_bundle": 8.6,
    "listener": 8.75,
    "full_training": 9, "other_target": 9, "run": 9,
    "doctor": 9.5, "rerun": 9.5, "scaffold": 9.5, "trial_cost": 9.5,
    "adapters": 10, "cli": 10, "testing": 10,
}  # fmt: skip

LIBRARY_ROOMS: dict[str, set[str]] = {
    "matplotlib": {"figures"},
    "mlflow": {"tracking"},
    "nncf": {"runtimes"},
    "onnx": {"runtimes"},
    "onnxruntime": {"portable", "runtimes"},
    "openvino": {"runtimes"},
    "optuna": {"optimization"},
    "pandas": {"run", "search_result"},
    "plotly": {"figures"},
    "ray": {"executors"},
    "rich": {"cli"},
    "sklearn": set(),
    "tensorly": {"decompositions"},
    "timm": {"adapters"},
    "torchao": {"runtimes"},
    "torchvision": {"adapters"},
    "transformers": {"adapters"},
    "typer": {"cli"},
}

# Reading commands and study scripts must not wait for torch.
WITHOUT_TORCH = {
    "cache",
    "candidates",
    "cli",
    "device",
    "disk",
    "early_stopping",
    "errors",
    "evaluation",
    "figures",
    "goals",
    "home",
    "home_records",
    "latency_model",
    "machine",
    "pareto",
    "masking",
    "plan",
    "reading",
    "recovery_settings",
    "reports",
    "spec",
    "tracking",
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> tuple[str, ...]:
    """`ranksearch/statistics/patches.py` as ("statistics", "patches"); a package's `__init__` as the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports, inside functions too; `from a import b` as `a.b`."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("ranksearch", *dotted(path)) if is_package else ("ranksearch", *dotted(path)[:-1])
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_imports_only_from_lower_floors(path: Path) -> None:
    room = dotted(path)[0]
    assert room in FLOORS, f"give {room!r} a floor in tests/test_floors.py"
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] != "ranksearch" or parts[1] in (room, "__version__"):
            continue
        assert parts[1] in FLOORS, f"{names(path)}:{line} imports {name}: import it from the module that defines it"
        assert FLOORS[parts[1]] < FLOORS[room], (
            f"{names(path)}:{line} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[parts[1]]})"
        )


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room = dotted(path)[0]
    for line, name in imported(path):
        library = name.split(".")[0]
        assert room in LIBRARY_ROOMS.get(library, {room}), f"{names(path)}:{line} imports {library}"
        assert library != "torch" or room not in WITHOUT_TORCH, f"{names(path)}:{line} imports torch"


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *MODULES], ids=names)
def test_nothing_imports_studies(path: Path) -> None:
    assert not [line for line, name in imported(path) if name.split(".")[0] == "studies" or "_studies" in name]


def test_no_public_function_bears_a_modules_name() -> None:
    stems = {name for path in MODULES for name in dotted(path)}
    clashes = [
        f"{names(path)}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in stems
    ]
    assert not clashes, "a function and a module of one name: importing one hides the other"


def test_importing_the_package_imports_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in eager}
    assert modules <= {"importlib", "typing"}
