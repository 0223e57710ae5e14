"""BatchNorm re-estimation and fine-tuning, on scikit-learn's digits."""

import copy
import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating
from ranksearch.recovery import Step, diverged, fine_tune, recover, reestimate_batchnorm
from ranksearch.recovery.budget import cosine, count_steps, one_cycle
from ranksearch.recovery.distillation import distillation_loss
from ranksearch.recovery.factors import ProductDecay, chain_norm
from ranksearch.recovery.layer_outputs import LayerOutputs
from ranksearch.recovery_settings import Budget, Recovery
from ranksearch.scores import top1
from ranksearch.scoring import output_distance, score_model


class FakeQuantizedConv(nn.Module):
    """A convolution in 8 bits, as the search would put it in place of a float one."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", layer.weight.detach().abs().amax((1, 2, 3)) / 127)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = torch.fake_quantize_per_tensor_affine(inputs, 0.02, 128, 0, 255)
        zeros = torch.zeros(len(self.scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.scale, zeros, 0, -127, 127)
        return F.conv2d(inputs, weight, self.layer.bias, padding=self.layer.padding)


class Shuffled:
    """Batches in a new order at every pass, from torch's global random numbers."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __iter__(self):
        for rows in torch.randperm(len(self.images)).split(self.size):
            yield self.images[rows], self.labels[rows]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train_batches() -> Shuffled:
    images, labels = digits()
    return Shuffled(images[:1200], labels[:1200], 100)


def test_batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits()
    return list(zip(images[1200:].split(200), labels[1200:].split(200), strict=True))


test_batches.__test__ = False


@functools.cache
def trained() -> nn.Sequential:
    """A small network, trained by `fine_tune` itself with an untrained teacher of constant outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )
    fine_tune(model, copy.deepcopy(model), train_batches(), F.cross_entropy, recovery(80, 0.2), seed=0)
    return model.eval()


def recovery(steps: int, learning_rate: float = 0.05) -> Recovery:
    return Recovery(steps=steps, learning_rate=learning_rate)


def damaged() -> nn.Sequential:
    """The network with noise on its weights."""
    model = copy.deepcopy(trained())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index in (0, 4, 10):
            weight = model[index].weight
            weight += weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def distance(model: nn.Module) -> float:
    images = digits()[0][1200:]
    with evaluating(model), evaluating(trained()):
        return output_distance(call_model(model, images), call_model(trained(), images), F.cross_entropy)


def accuracy(model: nn.Module) -> float:
    return score_model(model, test_batches(), top1).value


def tune(model: nn.Module, steps: int = 30, **options) -> list[float]:
    loss = options.pop("loss", F.cross_entropy)
    batches = options.pop("batches", None) or train_batches()
    return fine_tune(model, trained(), batches, loss, recovery(steps), seed=options.pop("seed", 0), **options)


def test_fine_tuning_recovers_a_damaged_network():
    model = damaged()
    before, start = distance(model), accuracy(model)
    seen = []
    losses = tune(model, on_step=seen.append)
    assert len(losses) == 30 and not diverged(losses)
    assert seen == [Step(number=i, share=i / 30, loss=loss) for i, loss in enumerate(losses, start=1)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert distance(model) < 0.3 * before and accuracy(model) > start
    assert not model.training and all(p.is_contiguous() and p.grad is None for p in model.parameters())


def test_fine_tuning_depends_on_the_seed_alone():
    models = [damaged() for _ in range(3)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    losses = [tune(models[0], 6), tune(models[1], 6)]
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers go on undisturbed"
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models[:2]), strict=True))
    assert tune(models[2], 6, seed=1) != losses[0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_brings_the_best_weights_back(bad, caplog):
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(None)
        return F.cross_entropy(outputs, targets) * (bad if len(calls) == 20 else 1.0)

    model = damaged()
    start = distance(model)
    losses = tune(model, loss=loss)
    assert len(losses) == 20 and diverged(losses)
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    assert distance(model) < start, "the best weights of the first steps, not the damaged ones"
    assert "diverged at step 20" in caplog.text


def test_an_infinite_loss_at_the_first_step_leaves_the_model_as_it_was():
    model = damaged()
    before = copy.deepcopy(model.state_dict())
    losses = tune(model, loss=lambda outputs, targets: outputs.sum() * math.inf)
    assert len(losses) == 1 and diverged(losses)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_that_are_not_finite_and_learning_rates_too_high():
    model = damaged()
    losses = tune(model, loss=lambda o, t: F.cross_entropy(o, t) + (o - o.detach()).abs().sqrt().sum())
    assert diverged(losses) and len(losses) == 1  # the root has no slope at zero
    wild = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10))
    batches, rate = train_batches(), Recovery(steps=60, learning_rate=1e6)
    assert diverged(fine_tune(wild, copy.deepcopy(wild), batches, F.cross_entropy, rate, seed=0))
    assert all(bool(p.isfinite().all()) for p in wild.parameters())


def test_gradients_go_straight_through_quantizers():
    model = damaged()
    model[4] = FakeQuantizedConv(model[4])
    before, weight = distance(model), model[4].layer.weight.clone()
    losses = tune(model)
    assert not diverged(losses) and distance(model) < 0.5 * before
    assert not torch.equal(model[4].layer.weight, weight)


def test_values_are_distilled_too():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    model = copy.deepcopy(dense)
    nn.init.normal_(model[1].weight, std=0.2)
    batches = [(images, dense(images).detach()) for images, _ in test_batches()]
    losses = fine_tune(model, dense, batches, F.mse_loss, recovery(60), seed=0, autocast=True)
    assert losses[-1] < 0.5 * losses[0]


def test_budgets():
    batches = test_batches()
    assert count_steps(batches, Recovery(epochs=0.5)) == round(len(batches) / 2)
    assert count_steps(iter(batches), Recovery(epochs=2)) == 2 * len(batches)
    assert count_steps(batches, Recovery(epochs=0.001)) == 1
    assert count_steps(batches, Recovery(epochs=5, steps=3)) == 3
    model, asked = damaged(), iter([False, False, True])
    assert len(tune(model, should_stop=lambda: next(asked))) == 2
    assert fine_tune(model, trained(), batches, F.cross_entropy, Recovery(epochs=0), seed=0) == []
    with pytest.raises(StudyError, match=r"nothing after 3 batches"):
        tune(model, batches=iter(batches))
    with pytest.raises(StudyError, match="no parameter that requires a gradient"):
        tune(model.requires_grad_(False))


def test_the_learning_rate_makes_one_cycle():
    rates = [one_cycle(step / 49) for step in range(50)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1, abs=1e-3) and 8 <= top <= 12
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


def test_the_cosine_warms_up_shortly():
    rates = [cosine(step / 99) for step in range(100)]
    top = rates.index(max(rates))
    assert 3 <= top <= 7 and rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw", "learning_rate": 0.003}, {"schedule": "cosine"}])
def test_every_optimizer_and_schedule_recovers(settings):
    model = damaged()
    before = distance(model)
    budget = Recovery(**{"steps": 30, "learning_rate": 0.05, **settings})
    losses = fine_tune(model, trained(), train_batches(), F.cross_entropy, budget, seed=0)
    assert len(losses) == 30 and not diverged(losses) and distance(model) < 0.5 * before


def test_a_budget_in_seconds_ends_by_the_clock_and_goes_down_the_whole_schedule():
    times = iter(range(1000))
    shares = []
    model = damaged()
    losses = fine_tune(
        model, trained(), train_batches(), F.cross_entropy, Recovery(seconds=20.0), seed=0,
        clock=lambda: float(next(times)), on_step=lambda step: shares.append(step.share),
    )  # fmt: skip
    assert 5 <= len(losses) <= 20 and shares == sorted(shares) and shares[-1] == 1.0
    assert fine_tune(model, trained(), train_batches(), F.cross_entropy, Recovery(seconds=0), seed=0) == []
    both = Recovery(seconds=1e6, steps=3)
    assert len(fine_tune(damaged(), trained(), train_batches(), F.cross_entropy, both, seed=0)) == 3


def factored() -> nn.Sequential:
    """The network with a layer in two factors, cut to half its rank."""
    model = damaged()
    u, s, v = torch.linalg.svd(model[4].weight.detach().flatten(1), full_matrices=False)
    first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    last = nn.Conv2d(8, 16, 1)
    with torch.no_grad():
        first.weight.copy_(v[:8].reshape(8, 8, 3, 3))
        last.weight.copy_((u[:, :8] * s[:8])[:, :, None, None])
        last.bias.zero_()
    model[4] = nn.Sequential(first, last)
    return model


def test_factors_are_balanced_and_their_product_decays():
    model = factored()
    first, last = (float(module.weight.detach().norm()) for module in model[4])
    assert first > 1.4 * last or last > 1.4 * first
    tuned = {decay: copy.deepcopy(model) for decay in (0.0, 0.3)}
    for decay, student in tuned.items():
        budget = Recovery(steps=20, learning_rate=0.05, weight_decay=decay)
        assert not diverged(fine_tune(student, trained(), train_batches(), F.cross_entropy, budget, seed=0))
    norms = {decay: float(chain_norm(tuple(student[4])).detach()) for decay, student in tuned.items()}
    assert norms[0.3] < 0.8 * norms[0.0]
    ratio = float((tuned[0.3][4][0].weight.norm() / tuned[0.3][4][1].weight.norm()).detach())
    assert 1 / 1.4 < ratio < 1.4


@pytest.mark.parametrize("rate", [None, 0.1])
def test_decay_follows_the_gradient_of_the_products_norm(rate):
    model = factored()
    decay = ProductDecay(model, 0.5)
    factors = [module.weight for module in model[4]]
    expected = torch.autograd.grad(chain_norm(tuple(model[4])) / 2, factors)
    before = [factor.detach().clone() for factor in factors]
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    decay.apply(rate)
    for factor, start, gradient in zip(factors, before, expected, strict=True):
        moved = factor.grad if rate is None else (start - factor.detach()) / rate
        torch.testing.assert_close(moved, 0.5 * gradient, rtol=1e-4, atol=1e-5)


def test_layers_outputs_are_distilled_where_asked():
    model = factored()
    with LayerOutputs(model, trained()) as layers, torch.no_grad():
        images = digits()[0][:50]
        call_model(model, images), call_model(trained(), images)
        start = float(layers.distance())
        assert start > 0.1 and float(layers.distance()) == 0.0, "each call counts once"
    for weight, less in ((0.0, 1.0), (5.0, 0.5)):
        student = copy.deepcopy(model)
        budget = Recovery(steps=30, learning_rate=0.05, layer_outputs=weight)
        noting = []
        losses = fine_tune(
            student, trained(), train_batches(), F.cross_entropy, budget, seed=0,
            on_step=lambda _step, layer=student[4], noting=noting: noting.append(bool(layer._forward_hooks)),
        )  # fmt: skip
        assert not diverged(losses) and set(noting) == {weight > 0}, "outputs are held only where they are used"
        with LayerOutputs(student, trained()) as layers, evaluating(student), evaluating(trained()):
            call_model(student, images), call_model(trained(), images)
            assert weight == 0 or float(layers.distance()) < less * start


def test_a_distillation_loss_and_a_trainer_of_ones_own():
    asked = []

    def distil(outputs: Tensor, wanted: Tensor) -> Tensor:
        asked.append(outputs.shape)
        return (outputs - wanted).square().mean()

    budget = Recovery(steps=4, distillation=1.0, distillation_loss=distil)
    fine_tune(damaged(), trained(), train_batches(), lambda *_: torch.tensor(math.pi), budget, seed=0)
    assert len(asked) == 4

    def own(model: nn.Module, budget: Budget) -> None:
        assert model.training and budget == Budget(epochs=None, steps=7, seconds=None)
        with torch.no_grad():
            model[10].bias += torch.rand(10)

    models = [damaged(), damaged()]
    for model in models:
        mine = Recovery(steps=7, fine_tune=own)
        assert recover(model, trained(), train_batches(), F.cross_entropy, mine, seed=3) == []
        assert not model.training
    assert torch.equal(models[0][10].bias, models[1][10].bias)
    assert not torch.equal(models[0][10].bias, damaged()[10].bias)

    def ruin(model: nn.Module, _budget: Budget) -> None:
        model[10].bias.data.fill_(math.nan)

    with pytest.raises(StudyError, match="fine_tune left weights that are not finite"):
        recover(damaged(), trained(), train_batches(), F.cross_entropy, Recovery(fine_tune=ruin), seed=0)


def test_distillation_is_zero_at_the_teacher():
    logits = torch.randn(8, 5, requires_grad=True)
    assert float(distillation_loss(logits, logits.detach(), F.cross_entropy).detach()) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(logits, logits.detach() + 1, F.mse_loss).detach()) > 0


def test_the_teacher_may_be_the_student():
    model = damaged()
    assert not diverged(fine_tune(model, model, train_batches(), F.cross_entropy, recovery(2), seed=0))


def test_batches_of_one_example():
    images, labels = digits()
    batches = list(zip(images[:3].split(1), labels[:3].split(1), strict=True))
    assert len(tune(damaged(), 3, batches=batches)) == 3


def wrong_norms() -> nn.Sequential:
    model = copy.deepcopy(trained())
    model[1].running_mean += 1
    model[5].running_var *= 4
    return model


def test_batchnorm_is_estimated_anew_where_that_is_better():
    model, dense = wrong_norms(), trained()
    before, weights = distance(model), [p.clone() for p in model.parameters()]
    assert reestimate_batchnorm(model, train_batches(), dense, test_batches(), F.cross_entropy)
    assert distance(model) < 0.2 * before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not model.training and model[1].momentum == 0.1
    again = wrong_norms()
    reestimate_batchnorm(again, train_batches(), dense, test_batches(), F.cross_entropy)
    assert torch.equal(again[1].running_mean, model[1].running_mean), "the order is that of the seed"


def test_batchnorm_is_the_same_again_whatever_the_data_draw_from():
    class Dimmed:
        def __iter__(self):
            for inputs, targets in train_batches():
                yield inputs * float(np.random.uniform(0.99, 1)) * random.uniform(0.99, 1), targets  # noqa: NPY002

    models = wrong_norms(), wrong_norms()
    for model in models:
        assert reestimate_batchnorm(model, Dimmed(), trained(), test_batches(), F.cross_entropy)
    assert torch.equal(models[0][1].running_mean, models[1][1].running_mean)


def test_batchnorm_stays_where_new_statistics_are_worse():
    model = copy.deepcopy(trained())
    before = copy.deepcopy(model.state_dict())
    noise = [(torch.randn(100, 1, 8, 8), None) for _ in range(3)]
    assert not reestimate_batchnorm(model, noise, trained(), test_batches(), F.cross_entropy)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not reestimate_batchnorm(nn.Linear(2, 2), noise, trained(), test_batches(), F.cross_entropy)


def test_the_teacher_answers_once_where_the_data_is_fixed():
    asked = []
    teacher = copy.deepcopy(trained())
    teacher.register_forward_hook(lambda *_: asked.append(None))
    fixed = list(train_batches())
    losses = []
    for batches, n_asked in ((fixed, 12), (train_batches(), 36), (Unknown(fixed), 36)):
        asked.clear()
        model = damaged()
        losses.append(fine_tune(model, teacher, batches, F.cross_entropy, recovery(36), seed=0))
        assert len(asked) == n_asked
    assert losses[0] == losses[2], "what is kept is what would be computed"
    asked.clear()
    alone = Recovery(steps=4, distillation=0.0)
    fine_tune(damaged(), teacher, fixed, F.cross_entropy, alone, seed=0)
    assert not asked, "who learns from the task alone asks no teacher"


class Unknown:
    """The same batches, of which nobody knows that they are."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Twice(nn.Module):
    """A model in which one factored layer occurs twice, and another is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(64, 16).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
        self.again = self.block
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.inputs(images.flatten(1)).relu()
        return self.head(self.again(self.block(hidden).relu()))


def test_a_layer_that_occurs_twice_and_one_that_is_frozen():
    torch.manual_seed(0)
    model = Twice()
    frozen, factor = model.inputs.weight.clone(), model.block[0].weight.detach().clone()
    batches = [*train_batches(), (digits()[0][:7], digits()[1][:7])]  # the last of another size
    losses = fine_tune(model, copy.deepcopy(model), batches, F.cross_entropy, recovery(26), seed=0)
    assert len(losses) == 26 and not diverged(losses) and sum(losses[-5:]) < sum(losses[:5])
    assert torch.equal(model.inputs.weight, frozen) and not torch.equal(model.block[0].weight, factor)
    assert model.block is model.again and not model.inputs.weight.requires_grad


def test_inputs_by_name_and_losses_of_several_parts():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
            logits = self.layer(images.flatten(1)) * mask[:, None]
            return {"logits": logits, "size": logits.square().mean(1)}

    def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets["labels"]) + 0.01 * outputs["size"].mean()

    torch.manual_seed(0)
    images, labels = digits()
    batches = [
        ({"images": images[i : i + 100], "mask": torch.ones(100)}, {"labels": labels[i : i + 100]})
        for i in range(0, 1200, 100)
    ]
    losses = fine_tune(Named(), Named(), batches, loss, recovery(24, 0.2), seed=0)
    assert len(losses) == 24 and sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_keep_the_structure_that_the_model_gives(autocast):
    class Output(dict):
        """A mapping with attributes, as transformers gives."""

        @property
        def logits(self) -> Tensor:
            return self["logits"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Output:
            return Output(logits=self.layer(images.flatten(1)))

    def loss(outputs: Output, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    losses = fine_tune(Model(), Model(), train_batches(), loss, recovery(6), seed=0, autocast=autocast)
    assert len(losses) == 6 and not diverged(losses)


class Flattening(nn.Module):
    """Reads the numbers of its activations in their order, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(self.convolution(images).relu(), 2)
        # In training alone, as of auxiliary outputs.
        return self.classifier(hidden.view(len(hidden), -1) if self.training else hidden.flatten(1))


def pairs() -> list[tuple[Tensor, Tensor]]:
    """A batch of images of two channels."""
    images, labels = digits()
    return [(torch.cat([images[:50], images[50:100]], 1), labels[:50])]


def channels_were_last(model: nn.Module, loss: object = F.cross_entropy, **changes: float) -> bool:
    """Whether they were in the weights of the first convolution while it was trained; afterwards they are not."""
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    were_last = []

    def note(_step: Step) -> None:
        were_last.append(not weight.is_contiguous())

    settings = Recovery(steps=2, learning_rate=0.01, **changes)
    losses = recover(model, copy.deepcopy(model), pairs(), loss, settings, seed=0, on_step=note)
    assert len(losses) == 2 and not diverged(losses)
    assert weight.is_contiguous()
    (found,) = set(were_last)
    return found


def test_channels_are_last_in_training() -> None:
    assert channels_were_last(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)))


@pytest.mark.parametrize("changes", [{}, {"layer_outputs": 1.0}, {"distillation": 0.0}], ids=str)
def test_a_model_that_reads_numbers_in_order_is_trained_as_it_is(changes: dict[str, float]) -> None:
    assert not channels_were_last(Flattening(), **changes)


def test_a_loss_that_reads_numbers_in_order_gets_them_so() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.view(len(outputs), 10, 64), labels[:, None].expand(-1, 64))

    assert channels_were_last(nn.Sequential(nn.Conv2d(2, 10, 3, padding=1)), loss)


def test_a_function_of_ones_own_trains_the_model_as_it_is() -> None:
    def own(given: nn.Module, _budget: Budget) -> None:
        ((images, labels),) = pairs()
        F.cross_entropy(given(images), labels).backward()

    assert recover(model := Flattening(), model, [], F.cross_entropy, Recovery(fine_tune=own, steps=1), seed=0) == []
