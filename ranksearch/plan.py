"""Plans: for every layer its decomposition, ranks, options and bits, and the JSON that holds them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ranksearch.errors import PlanError
from ranksearch.reading import parse_json, read_text, shown

SCHEMA: Literal[1] = 1
MAX_PLACE_CHARACTERS = 200

Option = int | str

# What options say of how weights are rounded, and what each may be; the rest are the decomposition's.
ROUNDING_OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "group_size": (32, 64),
    "scheme": ("affine", "symmetric"),
    "dtype": ("float16", "bfloat16"),
}


class _Value(BaseModel):
    """A frozen value that refuses unknown keys and wrong types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


class LayerChoice(_Value):
    """What becomes of one layer.

    `ranks` mean what the decomposition documents; what is no rank is an option, of the decomposition or of the
    rounding: `group_size` (32 or 64) and `scheme` (`affine` or `symmetric`) of 4-bit weights, `dtype` (`float16` or
    `bfloat16`) of 16-bit ones. Bits are those of weights and activations: 32 (float32), 16, 8 or 4.
    """

    decomposition: str = "none"
    ranks: tuple[int, ...] = ()
    options: dict[str, Option] = Field(default_factory=dict)
    weight_bits: Literal[32, 16, 8, 4] = 32
    activation_bits: Literal[32, 16, 8] = 32

    @field_validator("options")
    @classmethod
    def _known_rounding(cls, options: dict[str, Option]) -> dict[str, Option]:
        for name, allowed in ROUNDING_OPTIONS.items():
            if name in options and options[name] not in allowed:
                raise ValueError(f"{name} is {options[name]!r}; use {' or '.join(repr(value) for value in allowed)}")
        return options

    @property
    def factor_options(self) -> dict[str, Option]:
        """The decomposition's options alone."""
        return {name: value for name, value in self.options.items() if name not in ROUNDING_OPTIONS}

    @property
    def rounding_options(self) -> dict[str, Option]:
        """The options that tell how weights are rounded."""
        return {name: value for name, value in self.options.items() if name in ROUNDING_OPTIONS}

    @property
    def in_float(self) -> Self:
        """The same decomposition in float32."""
        return self.with_bits(32, 32)

    def with_bits(self, weight_bits: int, activation_bits: int, **rounding: Option) -> Self:
        """The same decomposition in other bits, rounded by these options."""
        options = {**self.factor_options, **rounding}
        return self.model_copy(
            update={"weight_bits": weight_bits, "activation_bits": activation_bits, "options": options}
        )

    @property
    def bits(self) -> str:
        """Weight and activation bits as tables show them: `8/8`."""
        return f"{self.weight_bits}/{self.activation_bits}"

    @property
    def rounding(self) -> str:
        """The bits with the options of rounding: equal for choices whose weights and activations are rounded alike."""
        return f"{self.bits} {json.dumps(self.rounding_options, sort_keys=True)}"

    @property
    def label(self) -> str:
        """The choice in a table's cell: `tucker2 (32, 16) 8/8`, `svd (16) kernel_last 8/8`."""
        ranks = f" {tuple(self.ranks)}".replace(",)", ")") if self.ranks else ""
        options = "".join(
            f" {value}" if isinstance(value, str) else f" {name}={value}" for name, value in self.options.items()
        )
        return f"{self.decomposition}{ranks}{options} {self.bits}"

    def key(self) -> str:
        """Canonical JSON: equal for equal choices."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key())


DENSE = LayerChoice()


class Quantizer(_Value):
    """An activation quantizer of `bits` on the tensor `where`, covering the values from `low` to `high`.

    `where` is the quantizer's name in the compressed model. It rounds its module's input or, where `output_of` names
    another module, the output of that, which the modules in `readers` take as well.
    """

    where: str
    output_of: str | None = None
    readers: tuple[str, ...] = ()
    low: float
    high: float
    bits: Literal[8] = 8


class Provenance(_Value):
    """Where a plan comes from; `sha256` is that of the weights that were scored."""

    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    study: str | None = None
    trial: int | None = None
    sha256: str | None = None


class Plan(_Value):
    """A choice for each layer by its dotted name; a layer not named stays dense."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    layers: dict[str, LayerChoice]
    quantizers: tuple[Quantizer, ...] = ()
    target: dict[str, int | str | None] | None = None
    provenance: Provenance | None = None

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Self:
        """Reads a plan. Raises PlanError, naming `source` and each offending key."""
        try:
            version = parse_json(text).get("schema")
        except (ValueError, AttributeError) as error:
            raise PlanError(f"{source} is not a JSON object: {error}") from None
        if version != SCHEMA:
            raise PlanError(f'{source}: schema is {shown(version)}; this version reads "schema": {SCHEMA}')
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"{source}: {_explain(error)}") from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a plan file. Raises PlanError where there is none, or none that is valid."""
        try:
            text = read_text(Path(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan file {path}: {error}") from None
        return cls.from_json(text, source=str(path))

    def to_json(self) -> str:
        """The plan as indented JSON; from_json gives it back, equal."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def choice(self, layer: str) -> LayerChoice:
        """What becomes of `layer`."""
        return self.layers.get(layer, DENSE)

    @property
    def in_float(self) -> Self:
        """The same decompositions in float32."""
        return self.model_copy(
            update={"layers": {name: choice.in_float for name, choice in self.layers.items()}, "quantizers": ()}
        )

    def changes(self) -> dict[str, LayerChoice]:
        """The layers that do not stay dense."""
        return {name: choice for name, choice in self.layers.items() if choice != DENSE}

    def hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of `layers` alone; layers that stay dense do not count."""
        chosen = {name: choice.model_dump(mode="json") for name, choice in self.changes().items()}
        text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """How many layers got what: `14x tucker2 8/8, 4x none 8/8`; `dense` where none is changed."""
        if not self.changes():
            return "dense"
        kinds = Counter(f"{c.decomposition} {c.bits}" for c in self.layers.values())
        return ", ".join(f"{n}x {kind}" for kind, n in kinds.most_common())


def _explain(error: ValidationError) -> str:
    """The first few problems of a plan, each with the place where it stands."""
    problems = []
    for problem in error.errors()[:3]:
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {shown(place)}")
        else:
            problems.append(f"{place[:MAX_PLACE_CHARACTERS]}: {problem['msg']}, got {shown(problem['input'])}")
    return "; ".join(problems)
