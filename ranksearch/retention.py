"""Which plans' folders stay on disk."""

import shutil
from collections.abc import Collection
from pathlib import Path


def keep_within(plans: Path, max_bytes: int, always: Collection[str]) -> None:
    """Deletes the oldest plan folders until they hold at most `max_bytes`; those named in `always` stay."""
    if not plans.is_dir():
        return
    sizes = {
        folder: sum(file.stat().st_size for file in folder.iterdir())
        for folder in plans.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }
    total = sum(sizes.values())
    for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
        if total <= max_bytes:
            return
        if folder.name not in always:
            shutil.rmtree(folder)
            total -= sizes[folder]
