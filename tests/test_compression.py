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
from standins import Conv1D, as_image, as_linear
from tiny_study import INT8, SVD, Pairs, plans
from torch import Tensor, nn

from ranksearch.compression import check_plan, compress, count_params, rebuild
from ranksearch.decompositions import DECOMPOSITIONS, Metric
from ranksearch.decompositions.base import AbstractDecomposition, Factorisation, Options, Ranks
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.errors import PlanError, StudyError
from ranksearch.factorisations import Factorisations
from ranksearch.finding import compressible_layers
from ranksearch.layers import ConvSpec, LayerSpec
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.quantization import QuantizedLinear, activation_quantizers, freeze, quantized_modules
from ranksearch.statistics import LayerStatistics, collect
from ranksearch.weights import bytes_in_file, load_stored, packed_bytes, safetensors_size, stored_state
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
    sessions = [bench.runtime.prepare(m.eval(), bench.example, bench.spec.target) for m in (placeholder, filled)]
    # OpenVINO writes one kernel as `brgemm_avx512_I8` and as `brgemm_avx512_i8`.
    kernels = [sorted(kernel.lower() for kernel in session.kernels().values()) for session in sessions]
    assert kernels[0] == kernels[1]
    n_int8 = sum(kernel.endswith("i8") for kernel in kernels[0])
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


class Curious(nn.Module):
    """Reads of its layers what transformers' models do: ViT the type of their weight, MobileNetV2 their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.filters.stride == (2, 2) and self.filters.kernel_size == (3, 3)
        assert self.head.in_features == 8
        means = self.filters(images.to(self.filters.weight.dtype)).mean((2, 3))
        outputs: torch.Tensor = self.head(means.to(self.head.weight.dtype))
        return outputs


@pytest.mark.parametrize("bits", [(32, 32), (8, 8)])
def test_a_model_may_ask_its_layers_for_their_sizes_and_types(bits: tuple[int, int]) -> None:
    model, images = Curious().eval(), torch.randn(8, 3, 9, 9)
    for ranks in ({"filters": (4,), "head": (2,)}, {}):
        choices = {name: choice(decomposition="svd", ranks=rank) for name, rank in ranks.items()}
        plan = Plan(layers={name: choices.get(name, choice()).with_bits(*bits) for name in ("filters", "head")})
        rebuilt = rebuild(model, plan) if bits == (8, 8) else rebuild(model, plan).double()
        for changed in (compress(model, plan, calibration=[(images, None)]), rebuilt):
            with torch.no_grad():
                assert changed(images).dtype == changed.head.weight.dtype
        state = compress(model, plan, calibration=[(images, None)]).state_dict()
        assert not ranks or "head.weight" not in state, "what is read of them is no state"


def choice(**fields: Any) -> LayerChoice:
    return LayerChoice(**fields)


@pytest.mark.parametrize(
    ("layer", "chosen", "message"),
    [
        ("33", choice(weight_bits=8, activation_bits=8), r"no layer '33'; did you mean '3'\?"),
        ("conv.weight", choice(), r"no layer 'conv.weight'; a layer's name is that of model.named_modules"),
        ("1", INT8, "layer '1' is a BatchNorm2d; only Linear, Conv1d, Conv2d and transformers' Conv1D can"),
        ("8", choice(decomposition="svd", ranks=(33,)), r"layer '8'.*\(33,\) are not all between 1 and \(32,\)"),
        ("8", choice(decomposition="svd", ranks=(0,)), r"layer '8'.*not all between 1"),
        ("8", choice(decomposition="svd", ranks=(2, 2)), r"layer '8'.*takes 1 ranks, not 2"),
        ("8", choice(decomposition="svd", ranks=(2,), options={"fold": 1}), r"layer '8'.*no options .*allowed are"),
        ("8", choice(decomposition="tucker2", ranks=(2, 2)), r"layer '8'.*tucker2 refuses it.*svd factors it"),
        (
            "8",
            choice(decomposition="tucker3", ranks=(2,)),
            r"layer '8'.*no decomposition 'tucker3'; known are none, svd",
        ),
        ("3", choice(weight_bits=4, activation_bits=8), r"layer '3': bits 4/8 are not built; use one of 32/32, 16/32"),
        ("3", choice(weight_bits=8, options={"scheme": "affine"}), r"layer '3': bits 8/32 have no option 'scheme'"),
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
    with pytest.raises(PlanError, match="layer '0': its weight is computed from others"):
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


class FixedFactorisation(Factorisation):
    """The weight in an orthonormal basis of kernels that never changes; ranks: (kernels,)."""

    def __init__(self, weight: Tensor, groups: int) -> None:
        self.dense, self.groups = weight.double(), groups

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        (rank,) = ranks
        n_outputs, n_inputs, *kernel = self.dense.shape
        basis = kernels(kernel)[:rank]
        last = torch.einsum("tsk,rk->tsr", self.dense.flatten(2), basis.double()).reshape(n_outputs, n_inputs * rank)
        first = basis.repeat(n_inputs * self.groups, 1).reshape(-1, 1, *kernel)
        return first, last.float()[(..., *[None] * len(kernel))]

    def weight(self, ranks: Ranks) -> Tensor:
        basis = kernels(list(self.dense.shape[2:]))[: ranks[0]].double()
        return (self.dense.flatten(2) @ basis.T @ basis).reshape(self.dense.shape).float()


class Fixed(AbstractDecomposition):
    """Filters of a fixed basis for each channel, then a trained mix of them."""

    name = "fixed"

    def refuse(self, spec: LayerSpec) -> str | None:
        return None if isinstance(spec, ConvSpec) else "a Linear has no kernel"

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return (torch.Size(spec.weight_shape[2:]).numel(),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec)
        (rank,) = ranks
        n_filtered = spec.in_channels * rank
        first = filtering(spec, spec.in_channels, n_filtered, groups=spec.in_channels)
        first.weight.requires_grad_(False)
        with torch.no_grad():
            first.weight.copy_(kernels(spec.kernel_size)[:rank].repeat(spec.in_channels, 1).reshape(first.weight.shape))
        return chain(first, pointwise(spec, n_filtered, spec.out_channels, groups=spec.groups, bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        assert isinstance(spec, ConvSpec)
        METRICS.append(metric)
        return FixedFactorisation(weight, spec.groups)


METRICS: list[Metric | None] = []


def kernels(sizes: Any) -> Tensor:
    """An orthonormal basis of kernels of these sizes, as rows."""
    n_taps = torch.Size(sizes).numel()
    drawn = torch.randn(n_taps, n_taps, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECOMPOSITIONS, "fixed", Fixed())
    METRICS.clear()


def pairs_of(inputs: Tensor, size: int) -> Pairs:
    return [(rows, torch.zeros(len(rows), dtype=torch.long)) for rows in inputs.split(size)]


def statistics_of(model: nn.Module, batches: Pairs) -> dict[str, LayerStatistics]:
    return collect(model, compressible_layers(model, batches[0][0][:1]).layers, batches, F.cross_entropy)


def a_grouped_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip


def fixed_plan(*layers: str, rank: int = 4, bits: Any = 32) -> Plan:
    chosen = LayerChoice(decomposition="fixed", ranks=(rank,), weight_bits=bits, activation_bits=bits)
    return Plan(layers=dict.fromkeys(layers, chosen))


@pytest.mark.usefixtures("fixed")
def test_the_metric_of_a_grouped_layer_holds_its_groups_and_its_gradients() -> None:
    model, batches = a_grouped_network(), pairs_of(torch.randn(40, 4, 6, 6), 20)
    statistics = statistics_of(model, batches)
    factorisations = Factorisations(model, statistics)
    compress(model, fixed_plan("0", "2"), calibration=batches, factorisations=factorisations)
    factorisations.of("0", LayerChoice(decomposition="fixed", ranks=(4,), options={"other": 1}))
    assert METRICS[2] is METRICS[0], "what a metric has computed serves every decomposition"
    del METRICS[2]
    for name, metric in zip(("0", "2"), METRICS, strict=True):
        assert metric is not None and metric.output is not None
        assert torch.equal(metric.input, statistics[name].input_covariance)
        assert torch.equal(metric.output, statistics[name].output_gradient_covariance)
    assert [metric.input.shape for metric in METRICS] == [(2, 18, 18), (8, 9, 9)]


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("layer", ["0", "2"])
def test_the_bias_keeps_the_mean_of_every_group(layer: str) -> None:
    model, batches = a_grouped_network(), pairs_of(torch.randn(60, 4, 6, 6) + 1, 60)
    factorisations = Factorisations(model, statistics_of(model, batches))
    compressed = compress(model, fixed_plan(layer, rank=2), factorisations=factorisations)
    upto = int(layer) + 1
    with torch.no_grad():
        outputs, expected = (each[:upto](batches[0][0]).mean((0, 2, 3)) for each in (compressed, model))
        blind = compress(model, fixed_plan(layer, rank=2))[:upto](batches[0][0]).mean((0, 2, 3))
    assert torch.allclose(outputs, expected, atol=1e-4)
    assert not torch.allclose(blind, expected, atol=1e-2)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("calibrated", [False, True])
def test_full_rank_of_grouped_layers_is_the_dense_model(calibrated: bool) -> None:
    model, inputs = a_grouped_network(), torch.randn(40, 4, 6, 6)
    compressed = compress(model, fixed_plan("0", "2", rank=9), calibration=pairs_of(inputs, 20) if calibrated else None)
    assert torch.allclose(compressed(inputs), model(inputs), atol=1e-4)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("bits", [32, 8])
def test_a_fixed_basis_never_trains_and_is_its_own_placeholder(bits: Any) -> None:
    model, batches = a_grouped_network(), pairs_of(torch.randn(40, 4, 6, 6), 20)
    plan = fixed_plan("0", "2", bits=bits)
    filled = compress(model, plan, calibration=batches, loss=F.cross_entropy)
    rebuilt = rebuild(model, plan)
    for each in (filled, rebuilt, copy.deepcopy(filled)):
        trained = {name for name, parameter in each.named_parameters() if parameter.requires_grad}
        fixed = {name for name, _ in each.named_parameters()} - trained
        assert fixed == {"0.0.weight", "2.0.weight"}
    for name in ("0.0.weight", "2.0.weight"):
        assert torch.equal(rebuilt.state_dict()[name], filled.state_dict()[name])
    freeze(filled)
    load_stored(rebuilt, stored_state(filled))
    assert not rebuilt[0][0].weight.requires_grad and rebuilt[0][1].weight.requires_grad
    assert torch.equal(rebuilt(batches[0][0]), filled(batches[0][0]))


def test_frozen_layers_that_are_only_quantized_stay_frozen() -> None:
    model = a_grouped_network()
    model[2].weight.requires_grad_(False)
    plan = Plan(layers=dict.fromkeys(("0", "2", "5"), INT8))
    for each in (rebuild(model, plan), compress(model, plan, calibration=pairs_of(torch.randn(9, 4, 6, 6), 9))):
        frozen = {name for name, parameter in each.named_parameters() if not parameter.requires_grad}
        assert frozen == {"2.weight"}


def a_sequence_network(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv1d(4, 8, 5, stride=2, padding=2)
    second, head = nn.Conv1d(8, 8, 3, padding=1, groups=4), nn.Linear(48, 5)
    layers = [first, second] if kind is nn.Conv1d else [as_image(first), as_image(second)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Flatten(), head).eval()


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("bits", [32, 8])
def test_a_conv1d_is_compressed_as_the_conv2d_of_height_one(bits: Any) -> None:
    inputs = torch.randn(50, 4, 12)
    plan = fixed_plan("0", "2", rank=2, bits=bits)
    outputs = []
    for kind, seen in ((nn.Conv1d, inputs), (nn.Conv2d, inputs.unsqueeze(2))):
        model = a_sequence_network(kind)
        compressed = compress(model, plan, calibration=pairs_of(seen, 25), loss=F.cross_entropy)
        assert shapes(compressed) == shapes(rebuild(model, plan))
        outputs.append(compressed(seen))
        placeholder = rebuild(model, plan)(seen)
        assert placeholder.isfinite().all() and float(placeholder.detach().std()) > 0
    assert float((outputs[0] - outputs[1]).detach().norm()) / float(outputs[1].detach().norm()) < (
        1e-4 if bits == 32 else 0.02
    )


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("decomposition", ["svd", "none"])
def test_the_conv1d_of_transformers_is_compressed_as_the_linear(decomposition: str, bits: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(Conv1D(12, 8), nn.GELU(), nn.Flatten(), nn.Linear(36, 5)).eval()
    linear = nn.Sequential(as_linear(original[0]), *original[1:])
    ranks = (3,) if decomposition == "svd" else ()
    chosen = LayerChoice(decomposition=decomposition, ranks=ranks, weight_bits=bits, activation_bits=bits)
    plan, batches = Plan(layers={"0": chosen}), pairs_of(torch.randn(40, 3, 8), 20)
    before = copy.deepcopy(original.state_dict())
    found, expected = (compress(each, plan, calibration=batches, loss=F.cross_entropy) for each in (original, linear))
    assert shapes(found) == shapes(expected) or plan.changes() == {}
    torch.testing.assert_close(found(batches[0][0]), expected(batches[0][0]), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    if plan.changes():
        assert not any(isinstance(module, Conv1D) for module in found.modules())
        rebuilt = rebuild(original, plan)
        assert shapes(rebuilt) == shapes(found)
        assert [type(m) for m in rebuilt.modules()] == [type(m) for m in found.modules()]
        assert (decomposition, bits) != ("none", 8) or type(found[0]) is QuantizedLinear


def test_statistics_of_another_model_name_the_layer(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    plan, calibration = plans()["float"], parts["train"][:1]
    wider = nn.Sequential(
        *copy.deepcopy(model[:3]), nn.Conv2d(16, 12, 3, stride=2, padding=1), *model[6:8], nn.Linear(48, 10)
    )
    foreign = statistics_of(wider, calibration)
    with pytest.raises(StudyError, match=r"layer '6', and Sequential has '0', '3', '8', '10'"):
        compress(model, plan, statistics={"6": foreign["6"]})
    with pytest.raises(
        StudyError, match=r"layer '3': .* output_gradient_covariance is \(12, 12\); .* needs \(24, 24\)"
    ):
        compress(model, plan, statistics={"3": foreign["3"], "0": foreign["0"], "8": LayerStatistics()})
    with pytest.raises(StudyError, match="nothing of layer '3', but of '0'; collect them"):
        compress(model, plan, statistics={"0": foreign["0"]})


@pytest.mark.parametrize("n_examples", [1, 100])
def test_a_calibration_set_of_one_batch_serves(n_examples: int, model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    inputs, targets = parts["train"][0]
    calibration = [(inputs[:n_examples], targets[:n_examples])]
    for plan in plans().values():
        outputs = compress(model, plan, calibration=calibration, loss=F.cross_entropy)(parts["validation"][0][0])
        assert outputs.isfinite().all()
    if n_examples > 1:
        fitted = compress(model, plans()["float"], calibration=calibration, loss=F.cross_entropy)
        assert accuracy(fitted, parts["validation"]) > accuracy(compress(model, plans()["float"]), parts["validation"])


def test_inputs_that_never_vary_leave_the_plain_factors() -> None:
    torch.manual_seed(0)
    model, plan = nn.Sequential(nn.Linear(8, 6)).eval(), Plan(layers={"0": SVD})
    fitted = compress(model, plan, statistics=statistics_of(model, pairs_of(torch.randn(1, 8), 1)))
    plain = compress(model, plan)
    assert torch.equal(fitted[0][0].weight, plain[0][0].weight)


@pytest.mark.parametrize("decomposition", ["svd", "tucker2", "spatial_svd"])
def test_linearly_dependent_inputs_are_compressed(decomposition: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(200, 5)).eval()
    half = torch.randn(60, 4, 5, 5)
    inputs = torch.cat([half, 2 * half], 1)
    inputs[:, 1] = 0.0
    rank = LayerChoice(decomposition=decomposition, ranks=(6, 6) if decomposition == "tucker2" else (6,))
    compressed = compress(model, Plan(layers={"0": rank}), calibration=pairs_of(inputs, 20), loss=F.cross_entropy)
    blind = compress(model, Plan(layers={"0": rank}))
    with torch.no_grad():
        errors = [float((each[0](inputs) - model[0](inputs)).norm()) for each in (compressed, blind)]
    assert errors[0] < 1.001 * errors[1]


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


SMALL = LayerChoice(decomposition="svd", ranks=(4,))


@pytest.mark.parametrize(
    "choice", [DENSE, INT8, DENSE.with_bits(4, 32), SMALL.with_bits(8, 8), SMALL.with_bits(16, 32)]
)
def test_what_a_layer_adds_to_a_file_does_not_depend_on_the_others(choice: LayerChoice) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    quantized = {"1": INT8, "2": DENSE.with_bits(4, 32)}
    before, after = (
        packed_bytes(rebuild(model, Plan(layers={**quantized, "3": changed}))) for changed in (SMALL, choice)
    )
    alone = [bytes_in_file(rebuild(nn.Sequential(model[3]), Plan(layers={"0": c}))) for c in (SMALL, choice)]
    # The header is padded to eight bytes; the places that it tells have more digits in a larger file.
    assert after - before == pytest.approx(alone[1] - alone[0], abs=40)
