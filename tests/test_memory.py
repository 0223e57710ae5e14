"""Freed memory goes back to the system."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ranksearch.memory import _malloc_trim, release_freed_memory
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target

N_BLOCKS, BLOCK_BYTES, KEPT_EACH = 2000, 100_000, 50


needs_glibc = pytest.mark.skipif(_malloc_trim() is None, reason="the C library is not glibc")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_glibc
def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    blocks = [bytes(BLOCK_BYTES) for _ in range(N_BLOCKS)]
    kept = blocks[::KEPT_EACH]
    full = resident_bytes()
    del blocks
    release_freed_memory()
    assert full - resident_bytes() > N_BLOCKS * BLOCK_BYTES / 2 and len(kept) == N_BLOCKS / KEPT_EACH


@needs_glibc
@pytest.mark.parametrize("name, mode", [("openvino", "eager"), ("onnxruntime", "eager"), ("torch", "compile")])
def test_a_model_is_freed_with_its_session(name: str, mode: str) -> None:
    target = Target(runtime=name, mode=mode, batch_size=1, threads=1)
    example = torch.randn(1, 2048)
    model_bytes = 2048 * 4096 * 4
    resident = []
    for _ in range(4):
        get_runtime(name).prepare(nn.Sequential(nn.Linear(2048, 4096)).eval(), example, target).run(example.numpy())
        gc.collect()
        release_freed_memory()
        resident.append(resident_bytes())
    assert resident[-1] - resident[0] < model_bytes, [f"{size >> 20} MiB" for size in resident]
