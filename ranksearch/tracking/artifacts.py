"""What of a study is for people: the front as a table, and its story in text and pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ranksearch.figures import Row, is_control
from ranksearch.tracking.entries import plain_cell

FRONT_FILE = "front.json"
# The tag that has MLflow show the table.
FRONT_TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": FRONT_FILE, "type": "table"}])}


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """How a study stands, for people: a note in Markdown, and files by their path among the run's artifacts."""

    note: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def front_table(rows: Sequence[Row]) -> str:
    """Front and controls as a table that MLflow shows; whole, where MLflow's own log_table would append."""
    front = [row for row in rows if row.get("pareto") or is_control(row)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return json.dumps({"columns": columns, "data": [[plain_cell(row, column) for column in columns] for row in front]})


def write_files(files: Mapping[str, str | bytes], folder: str) -> None:
    """Writes the files below a folder."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
