"""The contract of every runtime, as a check that a user's own runtime can run too."""

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranksearch.layers import call_model, layer_spec, weight_spec
from ranksearch.quantization import Half, Int4, Int8, freeze, observe_ranges, quantize_module, quantized_layers
from ranksearch.runtimes.base import INT8_BITS, AbstractRuntime, AbstractSession, float_bits, stayed_float, stayed_whole
from ranksearch.runtimes.structure import leaves_of
from ranksearch.spec import Target


class _TwoInputs(nn.Module):
    """Takes named inputs and gives named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 4)
        self.right = nn.Linear(3, 4)

    def forward(self, wide: torch.Tensor, narrow: torch.Tensor) -> dict[str, torch.Tensor]:
        joined = self.left(wide) + self.right(narrow)
        return {"sum": joined, "rows": joined.mean(1)}


class _Pair(nn.Module):
    """Takes two tensors and gives two."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first - second, first @ second.T


def check_runtime(runtime: AbstractRuntime, target: Target | None = None) -> None:
    """Raises AssertionError, saying what is wrong, where `runtime` does not keep the contract on `target`."""
    target = target or Target(runtime=runtime.name, batch_size=2, threads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runtime.check_installed()
        runtime.check(target)
        _check_records(runtime, target)
        for model, example in _models():
            _check_model(runtime, target, model.train(), example)
        _check_bits(runtime, target)
        _check_stored_bits(runtime, target)


def _models() -> list[tuple[nn.Module, Any]]:
    chain = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    rows = torch.randn(2, 6), torch.randn(2, 3)
    return [
        (chain, torch.randn(2, 1, 8, 8)),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), torch.randint(0, 11, (2, 5))),
        (_Pair(), (torch.randn(2, 4), torch.randn(2, 4))),
        (_TwoInputs(), {"narrow": rows[1], "wide": rows[0]}),
    ]


def _check_records(runtime: AbstractRuntime, target: Target) -> None:
    json.dumps(runtime.options(target))
    fingerprint = runtime.fingerprint(target)
    _demand(bool(fingerprint), "fingerprint() is empty")
    _demand(all(isinstance(v, str) for v in fingerprint.values()), "fingerprint() holds values that are no strings")
    _demand(fingerprint == runtime.fingerprint(target), "fingerprint() differs from call to call")
    _demand(1 <= runtime.weight_limit(target) <= 127, "weight_limit() is not within 1..127")


def _check_model(runtime: AbstractRuntime, target: Target, model: nn.Module, example: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = runtime.prepare(model, example, target)
    with tempfile.TemporaryDirectory() as directory:
        path = runtime.serialise(model, example, target, Path(directory))
        _demand(path.is_file(), f"serialise() gave {path}, which is no file")
        opened = runtime.open(path, target)
    _demand(model.training, "prepare() or serialise() changed the model's training mode")
    _demand(
        all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()),
        "prepare() or serialise() changed the model's state",
    )
    with torch.no_grad():
        expected = call_model(model.eval(), example)
    _check_session(session, model, example, expected, "prepared")
    _check_session(opened, model, example, expected, "opened")


def _check_session(session: AbstractSession, model: nn.Module, example: Any, expected: Any, which: str) -> None:
    arrays = _arrays(example)
    for _ in range(2):
        _compare(session.run(arrays), _arrays(expected), 1e-3, f"the {which} session")
    call = session.bind(arrays)
    for _ in range(2):
        _demand(call() is None, "a bound call gives something; it must give None")
    _compare(session.run(arrays), _arrays(expected), 1e-3, f"the {which} session, after a bound call")
    _demand(all(isinstance(k, str) and k for k in session.kernels().values()), "kernels() holds empty names")
    names = [name for name, module in model.named_modules() if layer_spec(module) is not None]
    found = session.layer_kernels()
    _demand(sorted(found) == sorted(names), f"layer_kernels() of the {which} session names {list(found)}, not {names}")


def _check_bits(runtime: AbstractRuntime, target: Target) -> None:
    """Every pair of bits that a runtime claims for a layer must also give the layer's outputs."""
    cases: list[tuple[nn.Module, torch.Tensor]] = [
        (nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 8, 8)),
        (nn.Linear(12, 10), torch.randn(2, 12)),
    ]
    for layer, example in cases:
        spec = layer_spec(layer)
        assert spec is not None
        bits = runtime.supported_bits(spec, target)
        _demand((32, 32) in bits, f"supported_bits({spec}) lacks (32, 32)")
        if INT8_BITS in bits:
            quantized = quantize_module(layer, Int8(runtime.weight_limit(target))).eval()
            observe_ranges(quantized, [example])
            freeze(quantized)
            with torch.no_grad():
                expected = quantized(example)
            session = runtime.prepare(quantized, example, target)
            _compare(session.run(_arrays(example)), _arrays(expected), 0.02, f"{type(layer).__name__} in int8")
            stayed = stayed_float([""], session.layer_kernels())
            _demand(not stayed, f"supported_bits({spec}) claims int8, but {stayed[''] if stayed else ''} ran")


def _check_stored_bits(runtime: AbstractRuntime, target: Target) -> None:
    """Weights of few bits give the rounded model's outputs, whether a kernel takes them so or they are stored alone."""
    chain = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)]
    head = [nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 5)]
    text = [nn.Embedding(11, 40, padding_idx=0), nn.LayerNorm(40), nn.Linear(40, 5)]
    formats = Half(), Int8(), Int4(), Int4(scheme="symmetric", group_size=64)
    subjects = ([*chain, *head], torch.randn(2, 4, 8, 8)), (text, torch.randint(0, 11, (2, 7)))
    activations = float_bits(target)
    for weights, (modules, example) in itertools.product(formats, subjects):
        layers = [
            quantize_module(m, weights, rounds_inputs=False) if weight_spec(m) is not None else m for m in modules
        ]
        model = nn.Sequential(*copy.deepcopy(layers)).eval()
        what = f"{type(weights).__name__} weights"
        with torch.no_grad():
            expected = model(example)
        with tempfile.TemporaryDirectory() as directory:
            opened = runtime.open(runtime.serialise(model, example, target, Path(directory)), target)
        tolerance = 1e-3 if activations == 32 else 0.05
        for session in (runtime.prepare(model, example, target), opened):
            _compare(session.run(_arrays(example)), _arrays(expected), tolerance, what)
        claimed = [
            name
            for name, module in quantized_layers(model).items()
            if weights.bits < 16 and (weights.bits, activations) in runtime.supported_bits(module.spec, target)
        ]
        if weights in (Int8(), Int4()):  # what is offered
            stayed = stayed_whole(claimed, opened.layer_kernels())
            _demand(not stayed, f"supported_bits() claims {weights.bits}/{activations} for layers that ran as {stayed}")


def _compare(outputs: Any, expected: Any, tolerance: float, what: str) -> None:
    """Demands equal structure, and values within `tolerance` of the largest."""
    _demand(type(outputs) is type(expected), f"{what} gives a {type(outputs).__name__}, not {type(expected).__name__}")
    if isinstance(expected, dict):
        _demand(list(outputs) == list(expected), f"{what} gives keys {list(outputs)}, not {list(expected)}")
    for got, wanted in zip(leaves_of(outputs), leaves_of(expected), strict=True):
        _demand(got.shape == wanted.shape, f"{what} gives shape {got.shape}, not {wanted.shape}")
        off = float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), 1e-6)
        _demand(off <= tolerance, f"{what} is off from torch by {off:.2g} of the largest output")


def _arrays(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: leaf.detach().numpy() for name, leaf in values.items()}
    if isinstance(values, tuple):
        return tuple(leaf.detach().numpy() for leaf in values)
    return values.detach().numpy()


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise AssertionError(complaint)
