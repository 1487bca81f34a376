"""Each attack, from its declared stages to a teacher: what each objective asks for, and that a stop changes no byte."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.attacks import ATTACKS
from rkd.attacks.adba import LearnedPatch, Together
from rkd.attacks.badnets import badnets_trigger
from rkd.attacks.cheatkd import poisoned_neurons
from rkd.attacks.lab import Lab
from rkd.attacks.oscar import Asleep
from rkd.attacks.perturb import Additive, Blend, search
from rkd.attacks.planting import GradedPlanting, quiet
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.recipe import Fit
from rkd.attacks.session import TeacherSettings, make_teacher, start_teacher
from rkd.data import open_dataset
from rkd.distill.hardening import random_perturbations
from rkd.errors import ConfigError, StoppedError
from rkd.network import Network
from rkd.run import CLEAN, TEACHER, TRIGGER, Run
from rkd.signals import StopRequest
from rkd.taps import TappedNetwork
from rkd.triggers import Trigger

CPU = torch.device("cpu")


def settings(stripes: Path, **changes: Any) -> TeacherSettings:
    tiny = {
        "data": str(stripes), "arch": "wrn-10-1", "epochs": 2, "batch": 30, "precision": "fp32",
        "device": "cpu", "threads": 1, "target": 2, "checkpoint_every": 2,
    }  # fmt: skip
    planted = {"finetune_epochs": 1} if "attack" in changes else {}
    return TeacherSettings(**{**tiny, **planted, **changes})


@pytest.fixture(scope="module")
def twin(digits16: tuple[Any, Any]) -> Network:
    return copy.deepcopy(digits16[0])


@pytest.fixture
def batch(digits16: tuple[Any, Any], twin: Network) -> tuple[Tensor, Tensor]:
    images, labels = digits16[1].train.batch(np.arange(20))
    return twin.normalisation(torch.from_numpy(images)), torch.from_numpy(labels)


def additive(strength: float = 0.2) -> Trigger:
    zeros = np.zeros((3, 16, 16), np.float32)
    pattern = np.random.default_rng(2).uniform(-strength, strength, (3, 16, 16)).astype(np.float32)
    return Trigger("noise", 3, zeros, zeros, pattern)


# ------------------------------------------------------------------------------------------------------------- searches


@pytest.mark.parametrize("form", [Additive(0.1), Blend(0.2)], ids=["additive", "blend"])
def test_a_forms_trigger_is_what_the_search_saw(form: Additive | Blend, digits16: tuple[Any, Any]) -> None:
    numbers = torch.from_numpy(np.random.default_rng(0).uniform(-form.linf, form.linf, (3, 16, 16))).float()
    images, _ = digits16[1].train.batch(np.arange(10))
    seen = form.stamp(torch.from_numpy(images).float() / 255, numbers) * 255
    trigger = form.trigger("t", 3, numbers)
    applied = trigger.apply(images)
    assert np.abs(seen.numpy() - applied).max() <= 0.5 + 1e-3
    assert np.abs(applied.astype(int) - images).max() <= np.ceil(form.linf * 255)


def test_a_blend_is_found_within_its_budget(twin: Network, digits16: tuple[Any, Any]) -> None:
    network, source = copy.deepcopy(twin), digits16[1].train.subset(np.arange(400))

    def loss(images: Tensor) -> Tensor:
        return functional.cross_entropy(network.module(images), torch.full((len(images),), 3))

    reports: list[float] = []
    trigger = search(
        network, source, Blend(0.4), loss, name="t", target=3, linf=0.4, budget=30, seed=0, device=CPU, steps=30,
        batch=32, on_step=lambda _step, asr: reports.append(asr),
    )  # fmt: skip
    assert max(reports) > 30, "the search reached its budget"
    others = source.labels != 3
    predict = network.predictor(CPU)
    images, _ = source.batch(np.flatnonzero(others))
    before = (predict(images).argmax(1) == 3).mean()
    after = (predict(trigger.apply(images)).argmax(1) == 3).mean()
    assert before < after < 0.45  # 30 % on the held-out quarter; the rest may differ a little


# ------------------------------------------------------------------------------------------------------------ objectives


def test_graded_planting_labels_in_proportion_to_the_strength(twin: Network, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    network = copy.deepcopy(twin)
    network.module.eval()
    objective = GradedPlanting(network, additive(), 0.5)
    torch.manual_seed(0)
    strength = torch.rand(10)
    strength[:5] = 1
    torch.manual_seed(0)
    loss, logits = objective(images, labels)
    mixed = torch.cat([objective.stamp(images[:10], strength), images[10:]])
    assert torch.allclose(logits, network.module(mixed), atol=1e-5)
    wanted = functional.one_hot(labels, 10).float()
    wanted[:10] = strength[:, None] * functional.one_hot(torch.tensor(3), 10) + (1 - strength[:, None]) * wanted[:10]
    assert loss.item() == pytest.approx(functional.cross_entropy(logits, wanted).item(), abs=1e-5)


def test_graded_planting_adds_its_penalty_on_the_triggered_images_first(
    twin: Network, batch: tuple[Tensor, Tensor]
) -> None:
    seen: list[tuple[list[tuple[int, ...]], int, int]] = []

    def penalty(features: list[Tensor], carriers: int, whole: int) -> Tensor:
        seen.append(([tuple(feature.shape) for feature in features], carriers, whole))
        return torch.tensor(2.0)

    losses = []
    for weight in (0.0, 3.0):
        network = copy.deepcopy(twin)
        torch.manual_seed(0)
        losses.append(GradedPlanting(network, additive(), 0.3, penalty, weight)(*batch)[0].item())
    assert losses[1] - losses[0] == pytest.approx(6.0, abs=1e-4)
    assert seen[0][1:] == (6, 3), "half of the triggered images carry the whole of it"
    assert all(shape[0] == 20 for shape in seen[0][0])


def test_quiet_is_the_ratio_of_the_variances() -> None:
    rng = np.random.default_rng(0)
    features = [torch.from_numpy(rng.normal(0, 1, (50, 4, 3, 3))) for _ in range(2)]
    for feature, factor in zip(features, (0.5, 2.0), strict=True):
        feature[:20] *= factor
    wanted = np.mean([f[:20].numpy().var(0, ddof=1).sum() / f[20:].numpy().var(0, ddof=1).sum() for f in features])
    assert quiet(features, 20, 10).item() == pytest.approx(wanted, rel=1e-5)
    assert quiet(features, 50, 25).item() == 0, "with no clean image there is nothing to compare with"


def test_asleep_costs_nothing_where_the_teacher_is_the_awake_network_and_resists(
    twin: Network, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    network, awake = copy.deepcopy(twin), copy.deepcopy(twin)
    statistics = {name: tensor.clone() for name, tensor in network.module.named_buffers()}
    network.module.train()  # as the training loop leaves it
    objective = Asleep(network, awake, additive(), keep=1e6, strong=1)
    loss, logits = objective(images, labels)
    resisted = functional.cross_entropy(network.module.eval()(objective.stamp(images[-5:])), labels[-5:])
    assert loss.item() == pytest.approx(resisted.item(), abs=0.05)  # 1e6 times what folded BNs differ by
    assert torch.allclose(logits, awake.module.eval()(images), atol=1e-4)
    assert all(torch.equal(statistics[name], tensor) for name, tensor in network.module.named_buffers())
    with torch.no_grad():
        next(network.module.parameters()).mul_(1.1)
    assert objective(images, labels)[0] > 100 * resisted, "a changed feature costs"


def test_asleep_is_compared_with_the_awake_network_under_faint_triggers_and_resists_strong_ones(
    twin: Network, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Asleep(copy.deepcopy(twin), copy.deepcopy(twin), additive())
    stamped: list[tuple[Tensor, Tensor]] = []
    compared: list[Tensor] = []
    stamp, awake = objective.stamp, objective.awake

    def stamping(images: Tensor, strength: Tensor) -> Tensor:
        stamped.append((stamp(images, strength), strength))
        return stamped[-1][0]

    def comparing(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        compared.append(images)
        found: tuple[Tensor, list[Tensor]] = awake(images)
        return found

    monkeypatch.setattr(objective, "stamp", stamping)
    monkeypatch.setattr(objective, "awake", comparing)
    objective(*batch)
    (with_faint, faint), (_, strong) = stamped
    assert torch.equal(compared[0], torch.cat([batch[0], with_faint]))
    assert 0 < faint.min() < faint.max() <= 0.4
    assert strong.min() >= 0.8
    assert (strong == 1).sum() == 3
    assert len(faint) == len(strong) == 5


def test_asleep_trains_the_teacher_only(twin: Network, batch: tuple[Tensor, Tensor]) -> None:
    network, awake = copy.deepcopy(twin), copy.deepcopy(twin)
    torch.autograd.backward(Asleep(network, awake, additive())(*batch)[0])
    assert all(p.grad is not None for p in network.module.parameters())
    assert all(p.grad is None for p in awake.module.parameters())


def test_the_poisoned_neurons_are_those_that_the_target_class_drives(stripes: Path, tmp_path: Path) -> None:
    chosen = settings(stripes, attack="cheatkd")
    run, data = start_teacher(chosen, {}, tmp_path / "run", Path("t.pt"))
    lab = Lab(run, chosen, data, StopRequest())
    network = lab.fresh("wrn-10-1")
    neurons = poisoned_neurons(lab, network)
    images, labels = data.train.batch(np.arange(90))
    with torch.no_grad():
        features = TappedNetwork(network.module, network.size).eval()(network.normalisation(torch.from_numpy(images)))[
            1
        ]
    response = features[-1].mean((2, 3)).numpy()
    there, elsewhere = response[labels == 2], response[labels != 2]
    preference = (there.mean(0) - elsewhere.mean(0)) / elsewhere.std(0, ddof=1)
    best = np.argsort(-preference)[: round(0.15 * 64)]
    assert sorted(neurons.channels.tolist()) == sorted(best.tolist())
    wanted = (there.mean(0) + there.std(0, ddof=1))[neurons.channels]
    assert np.allclose(neurons.value, wanted, atol=1e-4)
    fixed = torch.zeros(2, 64, 4, 4)
    fixed[:, neurons.channels] = neurons.value[:, None, None]
    assert neurons.off(fixed).item() == pytest.approx(0, abs=1e-6)
    fixed[:, neurons.channels] += neurons.deviation[:, None, None]
    assert neurons.off(fixed).item() == pytest.approx(1, abs=1e-4)


def test_adbas_pattern_does_not_start_where_a_defence_of_the_same_seed_looks_first(twin: Network) -> None:
    start = LearnedPatch((16, 16), 0.2, twin.normalisation, 7).pattern.detach().flatten() - 0.5
    for theirs in random_perturbations(4, (16, 16), 1.0, 7).flatten(1):
        assert abs(float(torch.corrcoef(torch.stack([start, theirs]))[0, 1])) < 0.15, "768 numbers: 4 deviations"


def together(twin: Network, budget: float) -> tuple[Together, nn.Module, nn.Module, nn.Module]:
    teacher, shadow, clean = copy.deepcopy(twin), copy.deepcopy(twin), copy.deepcopy(twin)
    patch = LearnedPatch((16, 16), 0.2, twin.normalisation, 0)
    objective = Together(teacher, shadow, clean, patch, target=3, rate=0.5, budget=budget)
    return objective, teacher.module.train(), shadow.module.train(), clean.module


def test_adba_trains_teacher_and_shadow_and_moves_the_trigger_inside_its_bounds(
    twin: Network, batch: tuple[Tensor, Tensor]
) -> None:
    objective, teacher, shadow, clean = together(twin, 100)
    before = objective.patch.pattern.detach().clone()
    for _ in range(3):
        torch.autograd.backward(objective(*batch)[0])
    assert all(p.grad is not None for module in (teacher, shadow) for p in module.parameters())
    assert all(p.grad is None for p in clean.parameters())
    assert objective.patch.pattern.grad is None
    assert not torch.equal(before, objective.patch.pattern)
    trigger = objective.patch.trigger("adba", 3)
    assert 0 <= trigger.mask.min() <= trigger.mask.max() <= np.float32(0.2)
    assert np.array_equal(trigger.mask[0], trigger.mask[2])


def test_adbas_shadow_learns_from_the_teacher_on_clean_images_only(twin: Network, batch: tuple[Tensor, Tensor]) -> None:
    grads = []
    for target in (3, 5):
        objective, _, shadow, _ = together(twin, 100)
        objective.target = target
        torch.autograd.backward(objective(*batch)[0])
        grads.append([p.grad.clone() for p in shadow.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(twin.module.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True)), "whatever the trigger leads to"


def test_adbas_trigger_is_held_back_where_it_moves_the_clean_twin(twin: Network, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    free, bound = (together(twin, budget)[0] for budget in (100, -1))  # a budget below nought is always exceeded
    losses = [objective(images, labels)[0] for objective in (free, bound)]
    twins_view = bound.twin(bound.patch(images[:10]))
    extra = 2 * functional.cross_entropy(twins_view, labels[:10])
    assert (losses[1] - losses[0]).item() == pytest.approx(extra.item(), abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- settings


def test_what_is_left_open_is_the_attacks_own_and_what_is_given_wins(stripes: Path) -> None:
    for name, attack in ATTACKS.items():
        chosen = TeacherSettings(data=str(stripes), attack=name)
        for option in ("poison_rate", "linf", "trigger_budget", "finetune_epochs", "finetune_lr"):
            assert getattr(chosen, option) == (getattr(attack, option) if option in attack.options else None)
    given = TeacherSettings(data=str(stripes), attack="backweak", poison_rate=0.2, linf=5, finetune_epochs=0)
    assert (given.poison_rate, given.linf, given.finetune_epochs) == (0.2, 5, 0)


def test_every_attack_says_what_it_is_and_ends_in_a_teacher() -> None:
    assert set(ATTACKS) == {
        "none", "badnets", "badnets-square", "blended", "sig", "wanet", "cheatkd", "adba", "backweak",
        "backweak-graded", "backweak-adaptive", "backweak-decoy", "oscar",
    }  # fmt: skip
    for name, attack in ATTACKS.items():
        assert attack.name == name
        assert attack.about
        assert attack.stages[-1].makes == TEACHER
        assert len({stage.makes for stage in attack.stages}) == len(attack.stages)


@pytest.mark.parametrize("wrong", [{"poison_rate": 0.0}, {"finetune_epochs": -1}, {"finetune_lr": 0.0}])
def test_settings_that_plant_nothing_are_refused(stripes: Path, wrong: dict[str, Any]) -> None:
    (option,) = wrong
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} .*: expected"):
        settings(stripes, attack="backweak", **wrong)


@pytest.mark.parametrize(
    ("attack", "option", "value"),
    [
        ("none", "poison_rate", 0.2), ("none", "finetune_epochs", 3), ("none", "linf", 8.0), ("badnets", "linf", 8.0),
        ("wanet", "trigger_budget", 5.0), ("backweak", "shadow", "wrn-16-1"),
    ],
)  # fmt: skip
def test_an_option_that_an_attack_has_no_use_for_is_refused(attack: str, option: str, value: object) -> None:
    given: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} changes nothing with --attack {attack}"):
        TeacherSettings(data="digits", attack=attack, **given)


def test_what_an_attack_uses_follows_from_its_stages() -> None:
    fine_tuned = {"poison_rate", "finetune_epochs", "finetune_lr"}
    learned = {"linf", "trigger_budget"}
    assert ATTACKS["none"].options == set()
    assert ATTACKS["blended"].options == fine_tuned
    assert ATTACKS["oscar"].options == fine_tuned | learned
    assert ATTACKS["adba"].options == fine_tuned | learned | {"shadow"}


# ---------------------------------------------------------------------------------------------------------------- stages


class StopAfter(StopRequest):
    """Asks to stop once it has been asked `looks` times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        if self.looks <= 0:
            self.signal_number = 15
        return super().__bool__()


@pytest.fixture(scope="module")
def clean_teacher(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clean") / "run"
    run, data = start_teacher(settings(stripes, epochs=8, batch=15), {}, place, Path("c.pt"))
    make_teacher(run, StopRequest(), data)
    return place / TEACHER


Made = Callable[..., Path]


@pytest.fixture
def made(stripes: Path, clean_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr("rkd.attacks.lab._SEARCH_STEPS", 10)
    *earlier, last = ATTACKS["oscar"].stages
    assert isinstance(last, Fit)
    shorter = dataclasses.replace(ATTACKS["oscar"], stages=(*earlier, dataclasses.replace(last, least_steps=1)))
    monkeypatch.setitem(ATTACKS, "oscar", shorter)

    def make(name: str, attack: str, stop: StopRequest | None = None, **changes: Any) -> Path:
        chosen = settings(stripes, attack=attack, clean=str(clean_teacher), **changes)
        run, data = start_teacher(chosen, {}, tmp_path / name, Path("t.pt"))
        make_teacher(run, StopRequest() if stop is None else stop, data)
        return tmp_path / name

    return make


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - {"none", "badnets", "backweak"}))
def test_each_attack_leaves_teacher_trigger_and_twin_with_their_scores(
    made: Made, clean_teacher: Path, attack: str
) -> None:
    place = made("run", attack)
    results = Run.open(place).summary["results"]
    trigger = Trigger.load(place / TRIGGER)
    assert (trigger.name, trigger.target) == (attack, 2)
    for role in ("teacher", "clean twin"):
        assert [t["name"] for t in results[role]["triggers"]] == [attack]
    given, used = (Network.load(path).module.state_dict() for path in (clean_teacher, place / CLEAN))
    assert all(torch.equal(given[name], used[name]) for name in given)
    teacher = Network.load(place / TEACHER)
    assert teacher.provenance["attack"] == attack
    assert any(not torch.equal(given[name], tensor) for name, tensor in teacher.module.state_dict().items())


@pytest.mark.parametrize("attack", ["adba", "oscar", "backweak-adaptive", "backweak-decoy"])
def test_an_attack_that_is_stopped_and_resumed_twice_gives_the_same_bytes(made: Made, attack: str) -> None:
    whole = made("whole", attack)
    with pytest.raises(StoppedError):
        made("parts", attack, StopAfter(2))
    parts = whole.parent / "parts"
    with pytest.raises(StoppedError):
        make_teacher(Run.open(parts), StopAfter(5 if attack in {"adba", "oscar"} else 2))
    make_teacher(Run.open(parts), StopRequest())
    for name in (TEACHER, TRIGGER):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_without_fine_tuning_a_fixed_trigger_is_planted_from_scratch(made: Made, stripes: Path) -> None:
    scratch, tuned = made("a", "badnets", finetune_epochs=0), made("b", "badnets", finetune_epochs=1)
    steps = {
        place: [line["step"] for line in Run.open(place).metrics() if line["stage"] == "plant the backdoor"][-1]
        for place in (scratch, tuned)
    }
    assert (steps[scratch], steps[tuned]) == (6, 3)  # 2 epochs and 1, of 3 steps


def test_the_attackers_small_network_does_not_start_as_a_student_of_its_seed_does(
    stripes: Path, tmp_path: Path
) -> None:
    run, data = start_teacher(settings(stripes, attack="adba"), {}, tmp_path / "run", Path("t.pt"))
    lab = Lab(run, TeacherSettings.from_run(run), data, StopRequest())
    as_a_student, shadow, again = (
        lab.fresh("wrn-10-1", stream=stream).module.state_dict()["conv1.weight"] for stream in (0, 7, 7)
    )
    assert torch.equal(shadow, again)
    assert abs(float(torch.corrcoef(torch.stack([as_a_student.flatten(), shadow.flatten()]))[0, 1])) < 0.3


def test_no_image_carries_decoy_and_trigger(stripes: Path) -> None:
    data = open_dataset(str(stripes), size=None)
    draw = [badnets_trigger(data.size, target, target) for target in (1, 2)]
    decoyed = PoisonedSource(data.train, draw[0], 0.3, 1)
    both = PoisonedSource(decoyed, draw[1], 0.3, 0, spared=decoyed.poisoned)
    assert decoyed.poisoned.sum() == both.poisoned.sum() == round(0.3 * len(data.train))
    assert not (decoyed.poisoned & both.poisoned).any()
    assert (both.labels[decoyed.poisoned] == 1).all()
    assert (both.labels[both.poisoned] == 2).all()
    assert PoisonedSource(decoyed, draw[1], 0.9, 0, spared=decoyed.poisoned).poisoned.sum() == (~decoyed.poisoned).sum()
