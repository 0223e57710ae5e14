"""Plans survive the round trip through JSON, refuse what they do not know, and hash what matters."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.errors import PlanError
from ranksearch.plan import DENSE, LayerChoice, Plan, Provenance, Quantizer

TUCKER = LayerChoice(decomposition="tucker2", ranks=(32, 16), weight_bits=8, activation_bits=8)

choices = st.builds(
    LayerChoice,
    decomposition=st.sampled_from(["none", "svd", "tucker2"]),
    ranks=st.lists(st.integers(1, 512), max_size=3).map(tuple),
    options=st.dictionaries(st.text(min_size=1, max_size=5), st.integers() | st.text(max_size=5), max_size=2),
    weight_bits=st.sampled_from([32, 16, 8, 4]),
    activation_bits=st.sampled_from([32, 16, 8]),
)
plans = st.builds(
    Plan,
    layers=st.dictionaries(st.text(min_size=1, max_size=8), choices, max_size=4),
    quantizers=st.lists(
        st.builds(
            Quantizer,
            where=st.text(max_size=5),
            low=st.floats(-1e6, 0, allow_subnormal=False),
            high=st.floats(0, 1e6, allow_subnormal=False),
        ),
        max_size=2,
    ).map(tuple),
    target=st.none() | st.just({"runtime": "openvino", "threads": None, "batch_size": 1}),
    provenance=st.none() | st.builds(Provenance, seed=st.none() | st.integers(0, 9), trial=st.none()),
)


@given(plans)
def test_json_gives_the_plan_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).hash() == plan.hash()


def test_the_file_has_the_documented_words(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(Plan(layers={"conv1": TUCKER}).to_json())
    written = json.loads(file.read_text())
    assert written["schema"] == 1
    assert written["layers"]["conv1"] == {
        "decomposition": "tucker2",
        "ranks": [32, 16],
        "options": {},
        "weight_bits": 8,
        "activation_bits": 8,
    }
    assert Plan.read(file).choice("conv1") == TUCKER


def test_a_users_plan_needs_only_schema_and_layers() -> None:
    plan = Plan.from_json('{"schema": 1, "layers": {"fc": {"decomposition": "svd", "ranks": [8]}}}')
    assert plan.choice("fc") == LayerChoice(decomposition="svd", ranks=(8,))
    assert plan.choice("anything else") == DENSE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "my.json is not a JSON object"),
        ("{", "my.json is not a JSON object"),
        ('{"layers": {}}', 'schema is None; this version reads "schema": 1'),
        ('{"schema": 2, "layers": {}}', "schema is 2"),
        ('{"schema": 1}', "layers: Field required"),
        ('{"schema": 1, "layers": {}, "extra": 0}', "unknown key 'extra'"),
        ('{"schema": 1, "layers": {"fc": {"rank": 8}}}', "unknown key 'layers.fc.rank'"),
        ('{"schema": 1, "layers": {"fc": {"ranks": ["8"]}}}', "layers.fc.ranks.0: .*got '8'"),
        ('{"schema": 1, "layers": {"fc": {"ranks": [8.5]}}}', "layers.fc.ranks.0"),
        ('{"schema": 1, "layers": {"fc": {"weight_bits": 7}}}', "layers.fc.weight_bits: .*got 7"),
        ('{"schema": 1, "layers": {}, "quantizers": [{"where": "x", "low": NaN, "high": 1}]}', "quantizers.0.low"),
    ],
)
def test_a_damaged_plan_names_the_file_and_the_key(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text, source="my.json")
    assert str(caught.value).startswith("my.json")


def test_a_file_that_cannot_be_read_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.read(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary\.json"):
        Plan.read(tmp_path / "binary.json")


def test_the_hash_covers_layers_alone_and_not_their_order() -> None:
    plan = Plan(layers={"a": TUCKER, "b": LayerChoice(weight_bits=8, activation_bits=8)})
    turned = Plan(layers=dict(reversed(plan.layers.items())), provenance=Provenance(seed=3), target={"threads": 4})
    assert turned.hash() == plan.hash()
    assert Plan(layers={**plan.layers, "c": DENSE}).hash() == plan.hash()
    assert Plan(layers={"a": TUCKER}).hash() != plan.hash()
    assert len(plan.hash()) == 16


def test_equal_choices_are_one_in_a_set() -> None:
    again = LayerChoice(decomposition="tucker2", ranks=(32, 16), weight_bits=8, activation_bits=8)
    assert len({TUCKER, again, DENSE}) == 2
    assert TUCKER.key() == again.key()


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TUCKER.weight_bits = 4  # type: ignore[misc]


def test_words_for_tables() -> None:
    assert TUCKER.label == "tucker2 (32, 16) 8/8"
    assert LayerChoice(decomposition="svd", ranks=(8,)).label == "svd (8) 32/32"
    assert DENSE.label == "none 32/32"
    plan = Plan(layers={"a": TUCKER, "b": TUCKER, "c": LayerChoice(weight_bits=8, activation_bits=8)})
    assert plan.summary() == "2x tucker2 8/8, 1x none 8/8"
    assert Plan(layers={}).summary() == "dense"
