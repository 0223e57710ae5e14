"""What a bundled trial was: all that its weights depend on, and what it measured; read with care, as a stranger's."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ranksearch.errors import StudyError
from ranksearch.spec import Target

# A trial's facts take a few kilobytes.
MAX_BYTES = 1 << 20

Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$", max_length=64)]


class TrialFacts(BaseModel):
    """A trial's `trial.json`: where it comes from, what its weights depend on, their SHA-256, and its figures.

    `plan` is the plan's hash; `torch_threads` are those that torch computed with, None where they were not recorded;
    `figures` are the front's columns.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_version: Literal[1] = Field(default=1, alias="schema")
    study: str
    trial: int
    plan: Hex
    weights_sha256: Hex
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    torch_threads: Annotated[int, Field(ge=1, le=1024)] | None
    target: Target
    fingerprint: dict[str, str]
    versions: dict[str, str]
    figures: dict[str, float | int | bool | str | None]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file. Raises StudyError where it is none, or not what a bundle holds."""
        try:
            # Before memory is taken: a device or a pipe has no size, and no end.
            if not path.is_file() or path.stat().st_size > MAX_BYTES:
                raise StudyError(f"{path} is no trial.json of a bundle: it is no file of at most {MAX_BYTES} bytes")
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"]) or "its text"
            raise StudyError(f"{path} is no trial.json of a bundle: {place}: {problem['msg']}") from None
        except (OSError, TypeError) as error:
            raise StudyError(f"{path} cannot be read: {error}; bundle the trial again") from None

    def to_json(self) -> str:
        """The facts as indented JSON; read gives them back, equal."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
