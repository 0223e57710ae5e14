"""Plans applied to a trained network: what is built, what is filled in, and what is refused."""

import copy
import io
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import INT8, SVD, Pairs, plans
from torch import Tensor, nn

from ranksearch.compression import Factorisations, check_plan, compress, count_params, rebuild
from ranksearch.errors import PlanError
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import activation_quantizers, freeze, quantized_modules
from ranksearch.weights import load_stored, packed_bytes, safetensors_size, stored_state
from ranksearch.workbench import Workbench, to_arrays

KINDS = list(plans())


def accuracy(model: nn.Module, batches: Pairs) -> float:
    with torch.no_grad():
        hits = [(model.eval()(inputs).argmax(1) == targets).float() for inputs, targets in batches]
    return float(torch.cat(hits).mean())


def shapes(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_rebuild_and_compress_give_one_architecture(
    kind: str, bench: Workbench, factorisations: Factorisations
) -> None:
    plan = plans()[kind]
    filled = compress(bench.model, plan, calibration=bench.calibration, factorisations=factorisations)
    placeholder = rebuild(bench.model, plan)
    assert shapes(placeholder) == shapes(filled)
    assert [type(m) for m in placeholder.modules()] == [type(m) for m in filled.modules()]
    assert [m.training for m in placeholder.modules()] == [m.training for m in filled.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_run_the_kernels_of_the_filled_model(
    kind: str, bench: Workbench, factorisations: Factorisations
) -> None:
    plan, limit = plans()[kind], bench.weight_limit
    filled = compress(
        bench.model, plan, calibration=bench.calibration, factorisations=factorisations, weight_limit=limit
    )
    placeholder = rebuild(bench.model, plan, limit)
    kernels = [
        sorted(bench.runtime.prepare(model.eval(), bench.example, bench.spec.target).kernels().values())
        for model in (placeholder, filled)
    ]
    assert kernels[0] == kernels[1]
    n_int8 = sum(kernel.lower().endswith("i8") for kernel in kernels[0])
    assert (n_int8 > 0) == any(choice.weight_bits == 8 for choice in plan.layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_model_stays_as_it_was(kind: str, model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    before = copy.deepcopy(model.state_dict())
    random_state, modules = torch.get_rng_state(), list(model.modules())
    mine = model.train()
    compressed = compress(mine, plans()[kind], calibration=parts["train"][:2], loss=F.cross_entropy)
    rebuilt = rebuild(mine, plans()[kind])
    assert list(model.modules()) == modules and all(m.training for m in modules)
    assert not any(module._forward_hooks for module in modules)
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    mine_memory = {p.data_ptr() for p in model.parameters()}
    assert mine_memory.isdisjoint(p.data_ptr() for m in (compressed, rebuilt) for p in m.parameters())


def test_rebuild_is_the_same_every_time(model: nn.Sequential) -> None:
    first, second = (rebuild(model, plans()["mixed"]).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    weight = first["3.2.weight"]
    assert float(weight.std()) > 0 and all(float(t.min()) > 0 for name, t in first.items() if name.endswith("scale"))


def test_full_rank_is_the_dense_model(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    plan = Plan(
        layers={
            "3": LayerChoice(decomposition="tucker2", ranks=(24, 16)),
            "8": LayerChoice(decomposition="svd", ranks=(32,)),
        }
    )
    inputs = parts["validation"][0][0]
    for calibration in (None, parts["train"][:2]):
        outputs = compress(model, plan, calibration=calibration)(inputs)
        assert torch.allclose(outputs, model(inputs), atol=1e-3)


def test_calibration_data_saves_accuracy(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    plan = Plan(layers={"3": LayerChoice(decomposition="svd", ranks=(6,)), "8": SVD})
    blind = accuracy(compress(model, plan), parts["validation"])
    fitted = accuracy(compress(model, plan, calibration=parts["train"]), parts["validation"])
    assert fitted > blind + 0.02


def test_eight_bits_cost_next_to_nothing(bench: Workbench, parts: dict[str, Pairs]) -> None:
    compressed = compress(bench.model, plans()["8 bits"], calibration=bench.calibration)
    assert len(quantized_modules(compressed)) == 4
    assert all(quantizer.observe is None for quantizer in activation_quantizers(compressed).values())
    assert accuracy(compressed, parts["validation"]) > accuracy(bench.model, parts["validation"]) - 0.02


def test_torch_and_openvino_compute_the_same(bench: Workbench, factorisations: Factorisations) -> None:
    for plan in plans().values():
        compressed = compress(
            bench.model,
            plan,
            calibration=bench.calibration,
            factorisations=factorisations,
            weight_limit=bench.weight_limit,
        ).eval()
        outputs = bench.runtime.prepare(compressed, bench.example, bench.spec.target).run(to_arrays(bench.example))
        with torch.no_grad():
            expected = compressed(bench.example)
        assert float((torch.as_tensor(outputs) - expected).norm() / expected.norm()) < 0.05


def choice(**fields: Any) -> LayerChoice:
    return LayerChoice(**fields)


@pytest.mark.parametrize(
    ("layer", "chosen", "message"),
    [
        ("33", choice(weight_bits=8, activation_bits=8), r"no layer '33'; did you mean '3'\?"),
        ("conv.weight", choice(), r"no layer 'conv.weight'; a layer's name is that of model.named_modules"),
        ("1", INT8, "layer '1' is a BatchNorm2d; only Linear and Conv2d can be compressed"),
        ("8", choice(decomposition="svd", ranks=(33,)), r"layer '8'.*\(33,\) are not all between 1 and \(32,\)"),
        ("8", choice(decomposition="svd", ranks=(0,)), r"layer '8'.*not all between 1"),
        ("8", choice(decomposition="svd", ranks=(2, 2)), r"layer '8'.*takes 1 ranks, not 2"),
        ("8", choice(decomposition="svd", ranks=(2,), options={"fold": 1}), r"layer '8'.*no options .*allowed are"),
        ("8", choice(decomposition="tucker2", ranks=(2, 2)), r"layer '8'.*tucker2 refuses it.*svd factors it"),
        ("8", choice(decomposition="cp", ranks=(2,)), r"layer '8'.*no decomposition 'cp'; known are none, svd"),
        ("3", choice(weight_bits=4, activation_bits=16), r"layer '3': bits 4/16 are not built; use 32/32 or 8/8"),
        ("3", choice(weight_bits=8), r"layer '3': bits 8/32 are not built"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layer(
    layer: str, chosen: LayerChoice, message: str, model: nn.Sequential
) -> None:
    plan = Plan(layers={layer: chosen})
    for refuse in (check_plan, rebuild, compress):
        with pytest.raises(PlanError, match=message):
            refuse(model, plan)  # type: ignore[operator]


def test_a_weight_that_is_computed_from_others_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(PlanError, match="layer '0' is a ParametrizedLinear"):
        rebuild(model, Plan(layers={"0": INT8}))
    layer = nn.Linear(8, 8)
    del layer.weight
    layer.weight = torch.ones(8, 8)  # as torch.nn.utils.weight_norm leaves it
    with pytest.raises(PlanError, match="layer '0': its weight is computed from others"):
        rebuild(nn.Sequential(layer), Plan(layers={"0": INT8}))


def test_calibration_data_must_be_there_and_last(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    with pytest.raises(PlanError, match="8-bit activations need calibration data"):
        compress(model, plans()["8 bits"])
    with pytest.raises(PlanError, match="yields nothing"):
        compress(model, plans()["float"], calibration=[])
    with pytest.raises(PlanError, match="not an iterator"):
        compress(model, plans()["float"], calibration=iter(parts["train"]))


def test_a_model_that_is_one_layer() -> None:
    model, plan = nn.Linear(8, 6), Plan(layers={"": SVD.model_copy(update={"weight_bits": 8, "activation_bits": 8})})
    batches = [(torch.randn(64, 8), torch.zeros(64, dtype=torch.long))]
    compressed = compress(model, plan, calibration=batches, loss=F.cross_entropy)
    assert shapes(compressed) == shapes(rebuild(model, plan)) and len(quantized_modules(compressed)) == 2
    assert compressed(batches[0][0]).shape == (64, 6)
    whole = compress(model, Plan(layers={"": INT8}), calibration=batches)
    assert torch.allclose(whole(batches[0][0]), model(batches[0][0]), atol=0.1)


class Twice(nn.Module):
    """One layer, registered under two names and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.last = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.again(self.first(inputs).relu()).relu())


@pytest.mark.parametrize("bits", [32, 8])
def test_shared_modules_stay_shared(bits: Any) -> None:
    torch.manual_seed(0)
    model = Twice()
    batches = [(torch.randn(64, 12), torch.zeros(64, dtype=torch.long))]
    plan = Plan(layers={"first": LayerChoice(decomposition="svd", ranks=(3,), weight_bits=bits, activation_bits=bits)})
    compressed = compress(model, plan, calibration=batches, loss=F.cross_entropy)
    assert compressed.first is compressed.again and model.first is model.again
    freeze(compressed)
    state = stored_state(compressed)
    assert not any(name.startswith("again.") for name in state)
    assert packed_bytes(compressed) == len(safetensors.torch.save(state))
    loaded = rebuild(model, plan)
    load_stored(loaded, state)
    assert loaded.first is loaded.again
    assert torch.equal(loaded(batches[0][0]), compressed(batches[0][0]))


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert set(stored_state(model)) == {"0.weight", "0.bias", "2.bias"}
    loaded = copy.deepcopy(model)
    nn.init.zeros_(loaded[0].weight)
    load_stored(loaded, stored_state(model))
    assert loaded[2].weight is loaded[0].weight and torch.equal(loaded[0].weight, model[0].weight)
    with pytest.raises(PlanError):
        load_stored(loaded, {name: t for name, t in stored_state(model).items() if name != "2.bias"})


def test_parameters_count_once() -> None:
    assert count_params(Twice()) == 12 * 12 + 12 + 12 * 3 + 3


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool]
)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=8)
buffers = st.dictionaries(names, st.tuples(dtypes, st.lists(st.integers(0, 12), max_size=3)), max_size=8)


@given(buffers)
@settings(max_examples=150, deadline=None)
def test_the_size_is_that_of_the_file(found: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in found.items()}
    assert safetensors_size(state) == len(safetensors.torch.save(state))


@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    quantized=st.booleans(),
    buffer_name=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6),
)
@settings(max_examples=25, deadline=None)
def test_packed_bytes_are_those_of_small_nets(widths: list[int], quantized: bool, buffer_name: str) -> None:
    layers = [nn.Linear(a, b, bias=b % 2 == 0) for a, b in zip(widths, widths[1:], strict=False)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(widths[-1]))
    model.add_module(f"größe-{buffer_name}", nn.Identity())
    model[-1].register_buffer(f"n_{buffer_name}", torch.zeros(3, dtype=torch.int64))
    plan = Plan(layers={str(i): INT8 for i in range(len(layers))} if quantized else {})
    rebuilt = rebuild(model, plan)
    file = io.BytesIO(safetensors.torch.save(stored_state(rebuilt)))
    assert packed_bytes(rebuilt) == len(file.getvalue())
