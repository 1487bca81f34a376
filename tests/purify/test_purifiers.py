"""Each purifier does to a teacher what its paper says, and nothing to the teacher that it was given."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.data import Source
from rkd.distill.attention import AttentionTransfer
from rkd.distill.loop import Recipe
from rkd.errors import ArchitectureError, CheckpointError, RunError
from rkd.metrics import Proportion
from rkd.models import build
from rkd.network import Network
from rkd.purify import Purification, purified
from rkd.purify import prune as prune_module
from rkd.purify.anp import AdversarialNeuronPerturbation, adversarial_neuron_pruning, neurons, prune, pruning_order
from rkd.purify.prune import dead_channels, prune_channels
from rkd.run import PURIFIED, Run
from rkd.signals import StopRequest
from rkd.taps import TappedNetwork, channel_writers

CPU = torch.device("cpu")
PURIFIERS = ("finetune", "prune", "nad", "anp")
Make = Callable[..., Purification]


@pytest.fixture
def make(tmp_path: Path, digits16: tuple[Any, Any]) -> Make:
    """Makes purifications of the digits' teacher, 300 images to learn on and 200 held out."""
    teacher, data = digits16
    recipe = Recipe(epochs=1, batch=50, augmentation="none", seed=3)

    def make(name: str = "run", teacher: Network = teacher, steps: int = 12, **changes: Any) -> Purification:
        clean, held_out = (data.train.subset(np.arange(a, b)) for a, b in ((0, 300), (900, 1100)))
        given = {
            "run": Run.create(tmp_path / name, "distill", {}), "stop": StopRequest(), "teacher": copy.deepcopy(teacher),
            "clean": clean, "held_out": held_out, "recipe": recipe, "steps": steps, "lr": 0.0, "device": CPU,
            "checkpoint_every": 5, "resume_hint": "rkd distill --resume run",
        }  # fmt: skip
        return Purification(**{**given, **changes})

    return make


def accuracy(network: Network, source: Source) -> float:
    images, labels = source.batch(np.arange(len(source)))
    return 100 * float(np.mean(network.predictor(CPU)(images).argmax(1) == labels))


def same(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("how", PURIFIERS)
def test_a_purified_teacher_is_another_network_that_still_knows_its_task(make: Make, how: str) -> None:
    work = make()
    before = copy.deepcopy(work.teacher.module)
    network = purified(how, work)
    assert same(before, work.teacher.module), "the teacher itself is not touched"
    assert not same(before, network.module)
    assert not network.module.training
    facts = work.run.summary["purified"]
    assert facts["held_out"] == 200
    assert facts["accuracy"] == pytest.approx(accuracy(network, work.held_out), abs=1e-3)
    assert facts["teacher_accuracy"] == pytest.approx(accuracy(work.teacher, work.held_out), abs=1e-3)
    assert facts["accuracy"] > facts["teacher_accuracy"] - 10
    assert not (work.run.path / "checkpoints").exists()
    stages = {line["stage"] for line in work.run.metrics()}
    assert len(stages) == (2 if how == "nad" else 1)
    assert not any(stage.startswith("distill") for stage in stages), "the student's curves are apart"


@pytest.mark.parametrize("how", PURIFIERS)
def test_what_is_purified_once_is_read_from_the_run_and_the_same_again_elsewhere(make: Make, how: str) -> None:
    work = make()
    first = purified(how, work)
    written = (work.run.path / PURIFIED).read_bytes()
    stamp = (work.run.path / PURIFIED).stat().st_mtime_ns
    assert same(first.module, purified(how, work).module)
    assert (work.run.path / PURIFIED).stat().st_mtime_ns == stamp
    torch.manual_seed(99)  # what happened before must not matter
    assert purified(how, other := make("other")) is not None
    assert (other.run.path / PURIFIED).read_bytes() == written


def test_a_damaged_purified_teacher_is_named(make: Make) -> None:
    work = make()
    work.run.keep(PURIFIED, b"nonsense")
    with pytest.raises(CheckpointError, match=r"purified\.safetensors is damaged"):
        purified("finetune", work)


@pytest.mark.parametrize(("how", "name"), [("nad", "finetuned.safetensors"), ("prune", "pruned.safetensors")])
def test_a_half_way_teacher_that_changed_is_refused_and_one_without_a_digest_made_again(
    make: Make, how: str, name: str
) -> None:
    work = make()
    purified(how, work)
    whole, half = ((work.run.path / file).read_bytes() for file in (PURIFIED, name))
    (work.run.path / PURIFIED).unlink()
    (work.run.path / name).write_bytes(work.teacher.to_bytes())  # a network that fits
    with pytest.raises(RunError, match=f"{re.escape(name)} has changed since the run made it"):
        purified(how, work)
    del work.run.summary["made"][name]
    purified(how, work)
    assert (work.run.path / name).read_bytes() == half
    assert (work.run.path / PURIFIED).read_bytes() == whole


def test_steps_are_the_same_however_many_images_there_are(make: Make) -> None:
    few = make("few", clean=make("unused").clean.subset(np.arange(20)))
    many = make("many")
    for work in (few, many):
        purified("finetune", work)
    steps = [work.run.metrics()[-1]["step"] for work in (few, many)]
    assert steps == [12, 12]  # 20 images: 12 epochs of one step; 300: two epochs of six


# -------------------------------------------------------------------------------------------------------------- pruning


def test_fine_pruning_kills_the_channels_that_clean_images_activate_least_and_they_stay_dead(make: Make) -> None:
    work = make()
    writers = channel_writers(work.teacher.module, work.teacher.size)
    network = purified("prune", work)
    dead = dead_channels(network.module, writers)
    assert 0 < int(dead.sum()) == work.run.summary["purified"]["pruned_channels"] < len(dead) == 64
    images, _ = work.clean.batch(np.arange(len(work.clean)))
    inputs = work.teacher.normalisation(torch.from_numpy(images))
    with torch.no_grad():
        _, features = TappedNetwork(work.teacher.module, work.teacher.size).eval()(inputs)
        _, pruned = TappedNetwork(network.module, network.size).eval()(inputs)
    activity = features[-1].relu().mean((0, 2, 3))
    assert float(activity[dead].max()) <= float(activity[~dead].min())
    assert not pruned[-1][:, dead].any(), "fine-tuning has not revived them"
    assert pruned[-1][:, ~dead].abs().amax((0, 2, 3)).gt(0).all()


def test_channels_are_ranked_on_images_of_all_classes_though_folders_go_class_by_class(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make()
    by_class = work.clean.subset(np.argsort(work.clean.labels, kind="stable"))
    monkeypatch.setattr(prune_module, "_RANKING_IMAGES", 100)
    asked = list[int]()
    batches = type(by_class).batches
    monkeypatch.setattr(
        type(by_class), "batches",
        lambda self, size, indices=None: asked.extend(self.labels[indices]) or batches(self, size, indices),
    )  # fmt: skip
    prune_module._activations(replace(work, clean=by_class), work.copy())
    counts = np.bincount(np.array(asked), minlength=10)
    assert counts.sum() == 100
    assert counts.min() >= 3, "of 300 images with 24 to 36 a class"


def test_pruning_stops_where_accuracy_would_fall_by_more_than_four_points(make: Make) -> None:
    work = make()
    purified("prune", work)
    only_pruned = work.stored("pruned.safetensors")
    assert only_pruned is not None
    assert accuracy(only_pruned, work.held_out) >= accuracy(work.teacher, work.held_out) - 4
    dead = dead_channels(only_pruned.module, channel_writers(only_pruned.module, only_pruned.size))
    assert 0 < int(dead.sum()) < 62, "of 64, a thirty-second at a time"
    images, _ = work.clean.batch(np.arange(len(work.clean)))
    with torch.no_grad():
        _, features = TappedNetwork(work.teacher.module, work.teacher.size).eval()(
            work.teacher.normalisation(torch.from_numpy(images))
        )
    order = np.argsort(features[-1].relu().mean((0, 2, 3)).numpy())
    further = work.copy()  # one portion of a thirty-second more
    prune_channels(further.module, ["bn1"], order[: int(dead.sum()) + 2])
    assert accuracy(further, work.held_out) < accuracy(work.teacher, work.held_out) - 4


@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "pyramidnet-11-8-bottleneck"])
def test_with_its_writers_at_nought_a_channel_of_the_last_tap_is_nought_in_every_network(name: str) -> None:
    torch.manual_seed(0)
    module = build(name, 3, (32, 32)).eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.bias, 0, 0.5)
    prune_channels(module, channel_writers(module, (32, 32)), np.array([1, 5]))
    with torch.no_grad():
        _, features = TappedNetwork(module, (32, 32)).eval()(torch.randn(2, 3, 32, 32))
    nought = features[-1].abs().amax((0, 2, 3)) == 0
    assert nought[[1, 5]].all()
    assert not nought.all()


@pytest.mark.parametrize("name", ["googlenet", "resnet20-a"])
def test_where_channels_are_mixed_pruning_is_refused_with_another_method(name: str) -> None:
    with torch.device("meta"), pytest.raises(ArchitectureError, match=r"--method finetune\+ofd"):
        channel_writers(build(name, 3, (32, 32)), (32, 32))


# ------------------------------------------------------------------------------------------------------------------ NAD


def test_nad_trains_the_teacher_towards_the_attention_of_its_fine_tuned_copy(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AttentionTransfer] = []

    def remembered(*arguments: Any) -> AttentionTransfer:
        made.append(AttentionTransfer(*arguments))
        return made[-1]

    monkeypatch.setattr("rkd.purify.finetune.AttentionTransfer", remembered)
    work = make(steps=12)
    network = purified("nad", work)
    (objective,) = made
    assert objective.weights == (500.0, 1000.0, 1000.0)  # Li et al. 2021, section 4.1
    images, _ = work.held_out.batch(np.arange(20))
    inputs = work.teacher.normalisation(torch.from_numpy(images))
    stored = work.stored("finetuned.safetensors")
    assert stored is not None
    guide = stored.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(objective.teacher(inputs)[0], guide(inputs), rtol=1e-3, atol=1e-3)
    assert not same(guide, network.module)
    lines = {line["stage"]: line["step"] for line in work.run.metrics()}
    assert lines == {"fine-tune a copy (NAD)": 6, "purify the teacher (NAD)": 12}


# ------------------------------------------------------------------------------------------------------------------ ANP


class NoisyBatchNorm(nn.Module):
    """A BN with mask and perturbation, written out: (m + delta) * w, (1 + xi) * b."""

    def __init__(self, bn: nn.BatchNorm2d, mask: Tensor, delta: Tensor, xi: Tensor) -> None:
        super().__init__()
        self.bn, self.mask, self.delta, self.xi = bn, mask, delta, xi

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        unit = (x - mean) / (var + self.bn.eps).sqrt()
        weight, bias = self.bn.weight * (self.mask + self.delta), self.bn.bias * (1 + self.xi)
        return unit * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def noisy(network: nn.Module, masks: list[Tensor], deltas: list[Tensor], xis: list[Tensor]) -> nn.Module:
    changed = copy.deepcopy(network)
    for name, *parts in zip(neurons(network), masks, deltas, xis, strict=True):
        parent, _, child = name.rpartition(".")
        bn = changed.get_submodule(name)
        assert isinstance(bn, nn.BatchNorm2d)
        setattr(changed.get_submodule(parent), child, NoisyBatchNorm(bn, *parts))
    return changed


def test_the_neurons_objective_is_the_papers_and_moves_only_masks() -> None:
    torch.manual_seed(0)
    network = build("wrn-10-1", 3, (16, 16)).train().requires_grad_(requires_grad=False)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.bias, 0, 0.5)
    objective = AdversarialNeuronPerturbation(network, eps=0.3, alpha=0.25)
    masks = list(objective.extra.parameters())
    with torch.no_grad():
        for mask in masks:
            mask.uniform_(-0.2, 1.2)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 3, (8,))
    torch.manual_seed(5)
    loss, logits = objective(images, labels)
    loss.backward()
    assert all(bool(((mask >= 0) & (mask <= 1)).all()) for mask in masks)

    torch.manual_seed(5)
    kept = [mask.detach() for mask in masks]
    noise = [torch.empty_like(mask).uniform_(-0.3, 0.3).requires_grad_() for mask in [*kept, *kept]]
    n = len(kept)
    worse = functional.cross_entropy(noisy(network, kept, noise[:n], noise[n:])(images), labels)
    worst = [
        (d + 0.3 * g.sign()).clamp(-0.3, 0.3).detach()
        for d, g in zip(noise, torch.autograd.grad(worse, noise), strict=True)
    ]
    variables = [mask.clone().requires_grad_() for mask in kept]
    zeros = [torch.zeros_like(mask) for mask in kept]
    natural = noisy(network, variables, zeros, zeros)(images)
    robust = functional.cross_entropy(noisy(network, variables, worst[:n], worst[n:])(images), labels)
    expected = 0.25 * functional.cross_entropy(natural, labels) + 0.75 * robust
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    torch.testing.assert_close(logits.detach(), natural.detach(), rtol=1e-3, atol=1e-4)
    for mask, wanted in zip(masks, torch.autograd.grad(expected, variables), strict=True):
        assert mask.grad is not None
        torch.testing.assert_close(mask.grad, wanted, rtol=2e-2, atol=1e-4)
    assert all(p.grad is None for p in network.parameters())


def test_neurons_are_the_bns_or_where_there_are_none_the_convolutions() -> None:
    assert neurons(build("wrn-10-1", 3, (16, 16))) == tuple(
        name for name, m in build("wrn-10-1", 3, (16, 16)).named_modules() if isinstance(m, nn.BatchNorm2d)
    )
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert neurons(plain) == ("0",)
    assert AdversarialNeuronPerturbation(plain)(torch.randn(2, 3, 3, 3), torch.tensor([0, 1]))[0].isfinite()
    with pytest.raises(ArchitectureError, match="no channels that could be pruned"):
        neurons(nn.Linear(3, 2))


def test_neurons_are_pruned_lowest_mask_first_and_what_is_to_stay_stays(make: Make) -> None:
    masks = {"bn1": torch.tensor([0.5, 1.0, 0.0]), "a": torch.tensor([0.0, 0.2, 0.96])}
    assert pruning_order(masks) == [("bn1", 2), ("a", 0), ("a", 1), ("bn1", 0)]
    network = make().copy()
    before = network.module.get_parameter("bn1.weight").detach().clone()
    prune(network, [("bn1", 3), ("bn1", 0)])
    after = network.module.get_parameter("bn1.weight").detach()
    assert after[[0, 3]].tolist() == [0, 0]
    keep = [i for i in range(len(before)) if i not in (0, 3)]
    assert torch.equal(after[keep], before[keep])


def test_as_many_neurons_are_pruned_as_held_out_accuracy_allows(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """One neuron a portion; the accuracy falls by a point and a half with each."""

    def accuracy(_work: Purification, network: Network) -> Proportion:
        weights = [network.module.get_parameter(f"{name}.weight") for name in neurons(network.module)]
        return Proportion(900 - 15 * sum(int((weight == 0).sum()) for weight in weights), 1000)

    monkeypatch.setattr(Purification, "accuracy", accuracy)
    monkeypatch.setattr("rkd.purify.anp._PARTS", 10**6)
    monkeypatch.setattr("rkd.purify.anp._KEPT", 1.01)
    work = make()
    adversarial_neuron_pruning(work)
    told = work.run.summary["purified"]
    assert told["pruned_neurons"] == 2
    assert told["accuracy"] == 87
