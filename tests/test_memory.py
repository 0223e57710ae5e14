"""Freed memory goes back to the system."""

import os
from pathlib import Path

import pytest

from ranksearch.memory import _malloc_trim, release_freed_memory

N_BLOCKS, BLOCK_BYTES, KEPT_EACH = 2000, 100_000, 50


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(_malloc_trim() is None, reason="the C library is not glibc")
def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    blocks = [bytes(BLOCK_BYTES) for _ in range(N_BLOCKS)]
    kept = blocks[::KEPT_EACH]
    full = resident_bytes()
    del blocks
    release_freed_memory()
    assert full - resident_bytes() > N_BLOCKS * BLOCK_BYTES / 2 and len(kept) == N_BLOCKS / KEPT_EACH
