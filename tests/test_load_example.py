"""The script in an export folder loads the model with torch and safetensors alone, wherever torch's modules suffice."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import SVD, plans
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.decompositions.cases import SPECS
from ranksearch.export import write_bundle
from ranksearch.layers import build_layer
from ranksearch.load_example import loading_script
from ranksearch.plan import LayerChoice, Plan
from ranksearch.workbench import Workbench

# Runs scripts, each with an argument, where nothing can be imported but torch, safetensors and what torch needs.
ALONE = """
import runpy
import sys
import sysconfig

THERE = {"torch", "torchgen", "functorch", "safetensors", "filelock", "typing_extensions", "setuptools", "sympy",
         "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "packaging", "dense", *sys.stdlib_module_names}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in THERE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
for script, argument in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.argv[1:] = [argument]
    runpy.run_path(script, run_name="__main__")
for name in ("ranksearch", "numpy"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
"""

DENSE = """
import torch
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
    )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.again = self.first
        self.second = nn.Linear(32, 5)
        self.tied = nn.Linear(32, 5)
        self.tied.weight = self.second.weight

    def forward(self, tokens, mask):
        hidden = torch.relu(self.first(tokens)) * mask + self.again(tokens)
        return {"logits": self.second(hidden), "hidden": hidden, "tied": self.tied(hidden)}


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.wave = nn.Conv1d(3, 24, 5, stride=2, padding="valid", dilation=2, groups=3, padding_mode="zeros")
        self.deep = nn.Conv2d(8, 24, (3, 5), padding="same", padding_mode="reflect")

    def forward(self, wave, image):
        return self.wave(wave), self.deep(image)


def alone():
    return nn.Linear(12, 32)
"""


def run_alone(*given: tuple[Path, str]) -> subprocess.CompletedProcess[str]:
    words = [str(word) for pair in given for word in pair]
    return subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, text=True, cwd=given[0][0].parent)


def dense_file(folder: Path) -> Path:
    path = folder / "dense.py"
    path.write_text(DENSE, encoding="utf-8")
    return path


def dense_model(name: str) -> nn.Module:
    names: dict[str, Any] = {}
    exec(DENSE, names)
    torch.manual_seed(0)
    model: nn.Module = names[name]().eval()
    return model


def bundled(bench: Workbench, model: nn.Module, example: Any, plan: Plan, folder: Path) -> Path:
    """A finished plan's folder, weights as the decompositions give them; the script in it."""
    compressed = rs.compress(model, plan, calibration=[(example, None)]).eval()
    write_bundle(replace(bench, model=model, example=example), plan, compressed, folder)
    return folder / "load_example.py"


def differences(done: subprocess.CompletedProcess[str]) -> Sequence[float]:
    assert done.returncode == 0, done.stderr
    return [float(line.rpartition(":")[2]) for line in done.stdout.splitlines()]


def test_a_float_model_is_loaded_where_there_is_only_torch(bench: Workbench, tmp_path: Path) -> None:
    dense = dense_file(tmp_path)
    small = Plan(layers={"first": SVD})
    chosen = {
        "float": (bench.model, bench.example, plans()["float"], "network"),
        "dense": (bench.model, bench.example, plans()["dense"], "network"),
        "mapping": (
            dense_model("Pair"), {"tokens": torch.randn(16, 12), "mask": torch.rand(16, 32)}, small, "Pair",
        ),
        "places": (
            dense_model("Places"),
            (torch.randn(16, 3, 40), torch.randn(16, 8, 9, 9)),
            Plan(layers={"deep": LayerChoice(decomposition="spatial_svd", ranks=(4,))}),
            "Places",
        ),
        "root": (dense_model("alone"), torch.randn(16, 12), Plan(layers={"": SVD}), "alone"),
    }  # fmt: skip
    scripts = [
        (bundled(bench, model, example, plan, tmp_path / kind), f"{dense}:{function}")
        for kind, (model, example, plan, function) in chosen.items()
    ]
    done = run_alone(*scripts)
    assert len(differences(done)) == len(chosen)
    assert all(difference < 1e-4 for difference in differences(done)), done.stdout


OWN = [
    name for name, decomposition in DECOMPOSITIONS.items() if type(decomposition).__module__.startswith("ranksearch.")
]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_decomposition_is_spelled_out_as_rebuild_builds_it(name: str, dtype: torch.dtype) -> None:
    decomposition = DECOMPOSITIONS[name]
    specs = [spec for spec in SPECS if decomposition.refuse(spec) is None]
    layers = [build_layer(spec).to(dtype) for spec in specs]
    choices = {}
    for i, spec in enumerate(specs):
        options = decomposition.options_for(spec)[0]
        ranks = decomposition.max_ranks(spec, options)
        choices[str(i)] = LayerChoice(decomposition=name, ranks=ranks, options=dict(options))
    plan = Plan(layers=choices)
    model = nn.Sequential(*layers)
    rebuilt = rs.rebuild(model, plan)
    names: dict[str, Any] = {"__name__": "script", "__file__": __file__}
    exec(compile(loading_script(plan, rebuilt, torch.zeros(1)), name, "exec"), names)
    names["load_model"] = lambda model, _path: model.load_state_dict(rebuilt.state_dict())
    own = names["compressed"](nn.Sequential(*layers))
    assert specs and repr(own) == repr(rebuilt)
    for (key, loaded), (wanted_key, wanted) in zip(own.named_parameters(), rebuilt.named_parameters(), strict=True):
        assert key == wanted_key and torch.equal(loaded, wanted)
        assert (loaded.dtype, loaded.requires_grad) == (wanted.dtype, wanted.requires_grad)


class Halved(nn.Module):
    """No module of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs) / 2
        return result


@pytest.mark.parametrize("name", ["0", 'a"""b\\N'])
@pytest.mark.parametrize("own", [Halved(), nn.Sequential(Halved()), nn.ReLU()])
def test_what_torch_cannot_make_asks_for_ranksearch(name: str, own: nn.Module) -> None:
    model = nn.Module()
    model.add_module(name, own)
    for choice, reason in ((SVD, "that are not torch's own"), (SVD.with_bits(8, 8), "Layers are quantized")):
        tree = ast.parse(loading_script(Plan(layers={name: choice}), model, torch.zeros(1)))
        assert reason in (ast.get_docstring(tree) or "")
        assert "ranksearch" in {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}


def test_names_of_layers_are_written_as_texts() -> None:
    name = 'a"); 1 / 0  #'
    model = nn.Module()
    model.add_module(name, nn.Linear(2, 2))
    model.add_module("b\\", model.get_submodule(name))
    names: dict[str, Any] = {"__name__": "script", "__file__": __file__}
    exec(loading_script(Plan(layers={name: SVD}), model, torch.zeros(1)), names)
    names["load_model"] = lambda *_: None
    found = names["compressed"](model)
    assert found.get_submodule("b\\") is found.get_submodule(name)


def test_another_architecture_is_refused(bench: Workbench, tmp_path: Path) -> None:
    dense = dense_file(tmp_path)
    script = bundled(bench, bench.model, bench.example, plans()["float"], tmp_path / "out")
    done = run_alone((script, f"{dense}:alone"))
    assert done.returncode != 0 and "key(s) in state_dict" in done.stderr
    done = run_alone((script, "nowhere.py"))
    assert done.returncode != 0 and "usage: " in done.stderr
