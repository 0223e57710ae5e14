"""How a model is while it is trained: its mode, place and random numbers, all of which come back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.memory_format import in_order
from ranksearch.runtimes.base import host_isa


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers from `seed`; afterwards they go on as if nothing had been drawn."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - users' data may draw from it
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def in_training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in train mode on `device`; its modes and device come back, its weights' numbers in their order."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    model.train()
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
        in_order(model)
        model.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in instructions of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(host_isa().split())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_finite(model: nn.Module) -> bool:
    """Whether all numbers of the model's state are."""
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    return all(bool(t.isfinite().all()) for t in state)
