"""Evaluations on file, so that samplers can be compared without a device, a network or data.

Each network has a folder: `profile.json`, the candidate table, and `evaluations.csv.gz`, a row for every plan. A row's
`plan` is the candidates' indices, layer by layer; `drop`, `low` and `high` (its 95 % interval) and `distance` are told
on validation images after BatchNorm re-estimation, `test` is the drop on test images, `bytes_ratio` over dense's.
"""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from search_evaluations import Evaluations, Indices, Recorded, Row, Split

from ranksearch.cache import write_atomically
from ranksearch.candidates import Profile

PUBLISHED = Path(__file__).parent / "published"
PROFILE, EVALUATIONS = "profile.json", "evaluations.csv.gz"
ON_VALIDATION = ("drop", "low", "high", "distance", "bytes_ratio")


def is_published(name: str, folder: Path = PUBLISHED) -> bool:
    """Whether there are evaluations of that network."""
    return (folder / name.lower() / PROFILE).is_file()


def open_published(name: str, folder: Path = PUBLISHED) -> Evaluations:
    """A network's evaluations. Raises LookupError for a network that there is none of, or a plan without a row."""
    place = folder / name.lower()
    if not is_published(name, folder):
        there = ", ".join(sorted(found.parent.name for found in folder.glob(f"*/{PROFILE}"))) or "none"
        raise LookupError(f"nothing is published of {name}; there is {there}")
    profile = Profile.from_json((place / PROFILE).read_text(encoding="utf-8"), source=str(place / PROFILE))
    rows = _read((place / EVALUATIONS).read_bytes())

    def measure(indices: Indices, split: Split) -> Row:
        row = rows.get(indices) if split != "fine_tuned" else None
        if row is None:
            raise LookupError(f"{place / EVALUATIONS} has no {split} row for plan {_word(indices)}")
        return {"drop": row["test"]} if split == "test" else {name: row[name] for name in ON_VALIDATION}

    return Evaluations(profile, Recorded(None), measure)


def publish(name: str, profile: Profile, recorded: Recorded, folder: Path = PUBLISHED) -> int:
    """Writes the plans that were evaluated on validation and on test images; gives how many."""
    by_split: dict[str, dict[Indices, Row]] = {"validation": {}, "test": {}}
    for (_, split), row in recorded.rows.items():
        by_split.get(split, {})[tuple(row["indices"])] = row
    both = sorted(by_split["validation"].keys() & by_split["test"].keys())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["plan", *ON_VALIDATION, "test"])
    for plan in both:
        told, tested = by_split["validation"][plan], by_split["test"][plan]
        writer.writerow([_word(plan), *(told[name] for name in ON_VALIDATION), tested["drop"]])
    place = folder / name.lower()
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / PROFILE, profile.to_json().encode())
    # Without the time, so that the same evaluations are the same file.
    write_atomically(place / EVALUATIONS, gzip.compress(text.getvalue().encode(), mtime=0))
    return len(both)


def _read(compressed: bytes) -> Mapping[Indices, Mapping[str, float]]:
    rows = csv.DictReader(io.StringIO(gzip.decompress(compressed).decode()))
    return {_plan(row.pop("plan")): {name: float(value) for name, value in row.items()} for row in rows}


def _word(plan: Sequence[int]) -> str:
    return "-".join(map(str, plan))


def _plan(word: str) -> Indices:
    return tuple(map(int, word.split("-")))
