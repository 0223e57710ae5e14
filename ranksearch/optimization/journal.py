"""The journal of a study in its home: Optuna's own file, one line a record."""

import errno
import json
import os
from pathlib import Path
from typing import Any, final

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ranksearch.errors import StudyError
from ranksearch.reading import check_lines, check_own_file

JOURNAL = "journal.log"


@final
class Journal(JournalFileBackend):
    """Optuna's file, where what a trial gathers until it is told reaches the disk together with that.

    Optuna has the disk confirm each record, of which a trial of 200 layers has more than 200. Without that a killed
    process loses nothing, and a machine that loses power no trial that was told.
    """

    def __init__(self, path: str) -> None:
        self._path, self._writing = path, JournalFileSymlinkLock(path)
        super().__init__(path, self._writing)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._writing.acquire()
        try:
            self._append(lines.encode(), lasting=not all("trial_id" in log and "state" not in log for log in logs))
        finally:
            self._writing.release()

    def _append(self, lines: bytes, lasting: bool) -> None:
        """All of it, or, where the disk is full, nothing: half a line would damage what is written after it."""
        with Path(self._path).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(lines)
                if written != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
                if lasting:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def mend_journal(journal: Path) -> None:
    """Removes what a killed process left behind: half a last line, and Optuna's lock on the file.

    Only for the coordinator: nobody else may be writing.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        keep = _complete_bytes(file.read())
        file.truncate(keep)


def _complete_bytes(content: bytes) -> int:
    """How many bytes of the journal are whole lines."""
    return content.rfind(b"\n") + 1


def open_journal(journal: Path) -> BaseStorage:
    """The storage that the journal is, made where it is not there. Raises StudyError where it is damaged."""
    try:
        check_own_file(journal)
        if journal.exists():
            check_lines(journal)
        return JournalStorage(Journal(str(journal)))
    except Exception as error:
        # Optuna replays whatever the lines say: what is wrong with one comes up anywhere.
        raise StudyError(
            f"the journal {journal} is damaged: {type(error).__name__}: {error}; "
            "restore it, or start over in another --home"
        ) from error
