"""The training loop: what it sees is derived from the seed, and where it stops it can go on, byte for byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from rkd.data import ArraySource
from rkd.distill.batches import augment, epoch_order, steps_per_epoch, training_batches
from rkd.distill.hardening import Hardened, UniversalPerturbations, random_perturbations
from rkd.distill.loop import Recipe, Step, Trainer, autocast
from rkd.distill.objectives import CrossEntropy, FeatureDistillation, Objective, margins
from rkd.distill.training import train
from rkd.errors import ConfigError, RkdError, RunError, StoppedError
from rkd.models import build
from rkd.network import Normalisation
from rkd.run import Run
from rkd.signals import StopRequest
from rkd.taps import TappedNetwork

CPU = torch.device("cpu")
SCALING = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def source(count: int, side: int = 16, seed: int = 0) -> ArraySource:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return ArraySource(images, rng.integers(0, 3, count))


# ---------------------------------------------------------------------------------------------------- order and batches


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_order_of_an_epoch_is_a_permutation(count: int) -> None:
    assert sorted(epoch_order(count, 3, 5)) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first = epoch_order(50, 1, 2)
    np.random.seed(0)  # noqa: NPY002  (the global state must not matter)
    assert np.array_equal(first, epoch_order(50, 1, 2))
    assert not np.array_equal(first, epoch_order(50, 1, 3))
    assert not np.array_equal(first, epoch_order(50, 2, 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 2, 1))


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(100, 10, 10), (109, 10, 10), (9, 10, 1), (10, 10, 1), (19, 10, 1)]
)
def test_only_full_batches_count_but_there_is_always_one(images: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(images, batch) == steps


def test_each_epoch_shows_each_image_at_most_once_and_the_labels_belong() -> None:
    data = source(23)
    seen: dict[int, list[bytes]] = {0: [], 1: []}
    truth = {image.tobytes(): label for image, label in zip(*data.batch(np.arange(23)), strict=True)}
    for epoch, step, images, labels in training_batches(data, 5, 1, 0, 8, "none"):
        assert epoch == step // 4
        seen[epoch] += [image.tobytes() for image in images]
        assert [truth[image.tobytes()] for image in images] == list(labels)
    assert all(len(epoch) == len(set(epoch)) == 20 for epoch in seen.values())
    assert seen[0] != seen[1]


def test_batches_from_the_middle_are_those_of_a_run_from_the_start() -> None:
    data = source(20)
    whole = list(training_batches(data, 6, 4, 0, 9, "crop-flip"))
    late = list(training_batches(data, 6, 4, 5, 9, "crop-flip"))
    assert [item[1] for item in late] == [5, 6, 7, 8]
    for a, b in zip(whole[5:], late, strict=True):
        assert a[:2] == b[:2]
        assert np.array_equal(a[2], b[2])
        assert np.array_equal(a[3], b[3])


def test_a_batch_larger_than_the_data_is_all_of_the_data() -> None:
    batches = list(training_batches(source(5), 64, 0, 0, 3, "none"))
    assert [(epoch, step, len(images)) for epoch, step, images, _ in batches] == [(0, 0, 5), (1, 1, 5), (2, 2, 5)]


# --------------------------------------------------------------------------------------------------------- augmentation


def mirrored(index: int, length: int) -> int:
    """Mirror image without repeating the edge: -1 is 1, `length` is `length - 2`."""
    index = abs(index)
    return index if index < length else 2 * (length - 1) - index


def window(image: np.ndarray, down: int, right: int) -> np.ndarray:
    _, height, width = image.shape
    rows = [mirrored(r + down, height) for r in range(height)]
    columns = [mirrored(c + right, width) for c in range(width)]
    return image[:, rows][:, :, columns]


@pytest.mark.parametrize(("how", "flipped"), [("crop", False), ("crop-flip", True)])
def test_every_augmented_image_is_a_window_of_the_mirrored_one(how: str, *, flipped: bool) -> None:
    count, height, width = 400, 8, 9
    image = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    out = augment(np.repeat(image[None], count, 0), how, np.random.default_rng(1))
    assert out.shape == (count, 3, height, width)
    assert out.dtype == np.uint8
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # an eighth of 8 pixels is one
    straight = {window(image, *shift).tobytes(): shift for shift in shifts}
    turned = {np.ascontiguousarray(window(image, *shift)[..., ::-1]).tobytes(): shift for shift in shifts}
    found = [(item.tobytes() in turned, (straight | turned)[item.tobytes()]) for item in out]
    flips = sum(flip for flip, _ in found)
    # 400 fair coins: 200, deviation 10. 9 equal shares of 400: 44, deviation 6.3. Five deviations.
    assert abs(flips - 200) < 50 if flipped else flips == 0
    assert all(abs(sum(shift == s for _, s in found) - 44.4) < 32 for shift in shifts)


@pytest.mark.parametrize(("side", "pad"), [(16, 2), (32, 4), (4, 1)])
def test_the_padding_is_an_eighth_and_at_least_a_pixel(side: int, pad: int) -> None:
    image = np.random.default_rng(2).integers(0, 256, (3, side, side), dtype=np.uint8)
    shifts = range(-pad, pad + 1)
    known = {window(image, down, right).tobytes(): (down, right) for down in shifts for right in shifts}
    out = augment(np.repeat(image[None], 600, 0), "crop", np.random.default_rng(0))
    used = {known[item.tobytes()] for item in out}
    assert {down for down, _ in used} == set(shifts) == {right for _, right in used}


def test_no_augmentation_leaves_the_images_as_they_are() -> None:
    images, _ = source(4).batch(np.arange(4))
    assert augment(images, "none", np.random.default_rng(0)) is images


def test_augmenting_leaves_the_source_untouched() -> None:
    images, _ = source(4).batch(np.arange(4))
    before = images.copy()
    augment(images, "crop-flip", np.random.default_rng(0))
    assert np.array_equal(images, before)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ConfigError, match="'mixup': expected one of none, crop, crop-flip"):
        augment(np.zeros((1, 3, 8, 8), np.uint8), "mixup", np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------------- the schedule


def toy(count: int = 20, **recipe: object) -> Trainer:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    settings = {"epochs": 1, "batch": 2, "augmentation": "none", **recipe}
    return Trainer(network, CrossEntropy(network), source(count, 4), SCALING, Recipe(**settings), CPU)  # type: ignore[arg-type]


def test_the_learning_rate_rises_in_a_line_and_falls_with_a_cosine() -> None:
    trainer = toy(20, lr=0.6, warmup=0.2)  # ten steps, two of them rising
    wanted = [0.2, 0.4, *(0.3 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    assert [step.lr for step in trainer.steps()] == pytest.approx(wanted)


def test_without_warmup_the_learning_rate_starts_at_its_highest() -> None:
    assert toy(20, lr=0.6, warmup=0.0).lr(0) == pytest.approx(0.6)


def test_one_step_is_nesterovs() -> None:
    trainer = toy(4, batch=4, lr=0.1, momentum=0.9, weight_decay=0.01, warmup=0.0)
    layer = trainer.network[1]  # type: ignore[index]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    images, labels = trainer.source.batch(epoch_order(4, 0, 0))
    x = ((images / 255 - 0.5) / 0.25).reshape(4, -1)
    z = x @ weight.double().numpy().T + bias.double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p[np.arange(4), labels] -= 1
    gradient = torch.from_numpy(p.T @ x / 4) + 0.01 * weight.double()
    (step,) = trainer.steps()
    # The first velocity is the gradient; Nesterov's step is gradient + 0.9 * velocity.
    torch.testing.assert_close(layer.weight.double(), weight.double() - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)
    assert int(step.hits) == int((z.argmax(1) == labels).sum())
    assert (step.number, step.epoch, step.ends_epoch, step.images) == (1, 0, True, 4)


def test_steps_say_where_in_which_epoch_they_are() -> None:
    steps = list(toy(7, epochs=2, batch=3).steps())
    assert [(s.number, s.epoch, s.ends_epoch) for s in steps] == [
        (1, 0, False), (2, 0, True), (3, 1, False), (4, 1, True),
    ]  # fmt: skip


def test_frozen_parameters_do_not_move_and_the_others_do() -> None:
    torch.manual_seed(0)
    network = build("wrn-10-1", 3, (16, 16))
    frozen = frozenset({"fc.weight", "fc.bias"})
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer = Trainer(network, CrossEntropy(network), source(8), SCALING, Recipe(epochs=2, batch=4), CPU, frozen)
    assert len(list(trainer.steps())) == 4
    moved = {name for name, p in network.named_parameters() if not torch.equal(before[name], p)}
    assert moved == set(before) - frozen


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 1}, {"lr": 0.0}, {"lr": -1.0}, {"lr": math.inf}, {"lr": math.nan}]
)
def test_impossible_recipes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="epochs must be at least 1, batch at least 2, lr above 0"):
        Recipe(**{"epochs": 1, **wrong})  # type: ignore[arg-type]


def test_precisions_that_the_device_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        autocast(CPU, "fp16")
    with pytest.raises(ConfigError, match="expected fp32, bf16 or fp16"):
        autocast(CPU, "int8")


# --------------------------------------------------------------------------------------------- the same bytes every time


def trainer_of(kind: str, seed: int) -> Trainer:
    """A trainer whose fresh weights come from `seed` and whose order comes from the recipe."""
    torch.manual_seed(seed)
    if kind == "mobilenet":  # dropout: the global generator matters as well
        module: nn.Module = build("mobilenet", 3, (32, 32))
        objective: Objective = CrossEntropy(module)
        data, recipe = source(6, 32), Recipe(epochs=1, batch=2, seed=3)
    else:
        module = build("wrn-10-1", 3, (16, 16))
        teacher = build("wrn-10-1", 3, (16, 16))
        teacher.load_state_dict(seeded_state())
        tapped = TappedNetwork(teacher.eval().requires_grad_(requires_grad=False), (16, 16), frozen=True).eval()
        first = random_perturbations(4, (16, 16), 8 / 255, seed)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = FeatureDistillation(module, tapped, (16, 16), margins(tapped, teacher, []))
        if kind == "hardened":
            hardening = UniversalPerturbations(first, 8 / 255, SCALING, share=0.3, fixed=False)
            objective = Hardened(objective, hardening)
        data, recipe = source(14), Recipe(epochs=2, batch=4, seed=3)
    return Trainer(module, objective, data, SCALING, recipe, CPU)


def seeded_state() -> dict[str, Tensor]:
    state = torch.get_rng_state()
    torch.manual_seed(77)
    try:
        return build("wrn-10-1", 3, (16, 16)).state_dict()
    finally:
        torch.set_rng_state(state)


def run_all(trainer: Trainer) -> list[Step]:
    return list(trainer.steps())


def weights(trainer: Trainer) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in trainer.network.state_dict().items()})


KINDS = ("mobilenet", "ofd", "hardened")


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, tuple[bytes, list[float]]]:
    done = {}
    for kind in KINDS:
        trainer = trainer_of(kind, 0)
        losses = [float(step.loss) for step in run_all(trainer)]
        done[kind] = weights(trainer), losses
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    kind: str, uninterrupted: dict[str, tuple[bytes, list[float]]]
) -> None:
    again = trainer_of(kind, 0)
    run_all(again)
    assert weights(again) == uninterrupted[kind][0]
    if kind != "mobilenet":  # which is slow
        other = trainer_of(kind, 1)
        run_all(other)
        assert weights(other) != uninterrupted[kind][0]


@pytest.mark.parametrize(  # within the first epoch, at its end, within the second
    ("kind", "stop_after"), [("mobilenet", 1), ("ofd", 1), ("ofd", 4), ("hardened", 3), ("hardened", 4)]
)
def test_going_on_from_a_state_gives_the_bytes_of_an_uninterrupted_run(
    kind: str, stop_after: int, uninterrupted: dict[str, tuple[bytes, list[float]]]
) -> None:
    first = trainer_of(kind, 0)
    steps = first.steps()
    for _ in range(stop_after):
        next(steps)
    state, done = first.state(), first.done
    steps.close()  # type: ignore[attr-defined]
    torch.rand(3)  # what happens to the generator and to the first trainer afterwards must not matter
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.zero_()
    second = trainer_of(kind, 99)
    second.load_state(state, done)
    losses = [float(step.loss) for step in run_all(second)]
    assert losses == uninterrupted[kind][1][stop_after:]
    assert weights(second) == uninterrupted[kind][0]


def test_the_state_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit this network"):
        toy().load_state(trainer_of("mobilenet", 0).state(), 1)


# ------------------------------------------------------------------------------------------------- in a run directory


def run_in(path: Path) -> Run:
    return Run.create(path, "distill", {})


def go(trainer: Trainer, run: Run, stop: StopRequest | None = None, **more: object) -> None:
    settings = {"stage": "s", "resume_hint": "rkd go on", "checkpoint_every": 2, **more}
    train(trainer, run, StopRequest() if stop is None else stop, **settings)  # type: ignore[arg-type]


class Bad:
    """An objective whose loss stops being a number."""

    def __init__(self, network: nn.Module, value: float) -> None:
        self.network, self.value = network, value
        self.extra: nn.Module = nn.Module()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        return logits.sum() * self.value, logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_learning_rate(tmp_path: Path, value: float) -> None:
    trainer = toy(20, lr=0.25)
    trainer.objective = Bad(trainer.network, value)
    run = run_in(tmp_path / "run")
    with pytest.raises(RkdError, match=r"s: the loss became .* at step 1; lower --lr \(it is 0\.25\)"):
        go(trainer, run)
    assert next(run.checkpoints(), None) is None


def test_a_stop_saves_the_step_and_the_next_start_goes_on_from_it(tmp_path: Path) -> None:
    whole = toy(20)
    reference = run_in(tmp_path / "whole")
    go(whole, reference, checkpoint_every=1000)
    run, stop = run_in(tmp_path / "run"), StopRequest()

    class StopAtThree(Trainer):
        def steps(self) -> object:  # type: ignore[override]
            for step in super().steps():
                if step.number == 3:
                    stop.signal_number = 15
                yield step

    first = toy(20)
    first.__class__ = StopAtThree
    with pytest.raises(StoppedError, match="stopped and saved at step 3 of 10; go on with: rkd go on") as caught:
        go(first, run, stop, checkpoint_every=1000)
    assert caught.value.exit_code == 143
    second = toy(20)
    go(second, Run.open(run.path), checkpoint_every=1000)
    assert weights(second) == weights(whole)
    assert (run.path / "metrics.jsonl").read_bytes() == (reference.path / "metrics.jsonl").read_bytes()


def test_the_log_has_the_mean_of_each_group_of_steps_and_the_figures_of_each_epoch(tmp_path: Path) -> None:
    trainer, run = toy(44, epochs=2), run_in(tmp_path / "run")  # 22 steps an epoch
    losses: list[float] = []
    hits: list[int] = []
    step_of = Trainer.steps

    class Recording(Trainer):
        def steps(self) -> object:  # type: ignore[override]
            for step in step_of(self):
                losses.append(float(step.loss))
                hits.append(int(step.hits))
                yield step

    trainer.__class__ = Recording
    go(trainer, run, on_epoch=lambda: {"ACC": 12.5})
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    groups = [line for line in lines if "loss" in line]
    assert [line["step"] for line in groups] == [20, 22, 40, 44]
    for line, (start, end) in zip(groups, [(0, 20), (20, 22), (22, 40), (40, 44)], strict=True):
        assert line["loss"] == pytest.approx(np.mean(losses[start:end]), abs=1e-6)
        assert line["accuracy"] == pytest.approx(100 * sum(hits[start:end]) / (2 * (end - start)), abs=1e-3)
    epochs = [(line["epoch"], line["step"], line["ACC"]) for line in lines if line.get("ends_epoch")]
    assert epochs == [(0, 22, 12.5), (1, 44, 12.5)]


def test_looking_at_the_test_images_leaves_the_network_in_train_mode(tmp_path: Path) -> None:
    trainer = trainer_of("mobilenet", 0)
    modes: list[bool] = []

    def look() -> dict[str, float]:
        trainer.network.eval()
        return {}

    def watch(module: nn.Module, _inputs: object, _output: object) -> None:
        modes.append(module.training)

    trainer.network.register_forward_hook(watch)
    go(trainer, run_in(tmp_path / "run"), on_epoch=look)
    assert modes == [True] * 3


def test_a_stage_does_not_go_on_from_another_stages_checkpoint_nor_let_it_push_out_its_own(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    go(toy(40), run, stage="first")  # 20 steps; its checkpoints are left behind, as after a kill
    second = toy(20)
    steps: list[int] = []

    class Dies(Trainer):
        def steps(self) -> object:  # type: ignore[override]
            for step in super().steps():
                steps.append(step.number)
                if step.number == 5:
                    raise KeyboardInterrupt
                yield step

    second.__class__ = Dies
    with pytest.raises(KeyboardInterrupt):
        go(second, run, stage="second")
    assert steps == [1, 2, 3, 4, 5]
    found = next(run.checkpoints(), None)
    assert found is not None
    assert found[0] == 4


# ---------------------------------------------------------------------------------------------------------- checkpoints

Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "a flipped bit": lambda p: (p / "a").write_bytes(b"two!"),
    "cut short": lambda p: (p / "a").write_bytes(b"tw"),
    "a member missing": lambda p: (p / "a").unlink(),
    "no digests": lambda p: (p / "digests.json").unlink(),
    "digests cut short": lambda p: (p / "digests.json").write_text('{"a": "'),
    "digests of nothing": lambda p: (p / "digests.json").write_text("{}"),
    "digests are a list": lambda p: (p / "digests.json").write_text("[]"),
    "digests are a list of names": lambda p: (p / "digests.json").write_text('["a"]'),
    "digests are a number": lambda p: (p / "digests.json").write_text("5"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: Damage) -> None:
    run = run_in(tmp_path / "run")
    run.save_checkpoint(1, {"a": b"one"})
    run.save_checkpoint(2, {"a": b"two"})
    assert next(run.checkpoints(), None) == (2, {"a": b"two"})
    damage(run.path / "checkpoints" / "00000002")
    assert next(run.checkpoints(), None) == (1, {"a": b"one"})
    run.save_checkpoint(2, {"a": b"two"})  # the step is done again
    assert next(run.checkpoints(), None) == (2, {"a": b"two"})


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    for step in (5, 9, 10, 100):
        run.save_checkpoint(step, {"a": b"x"})
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["00000010", "00000100"]


PLACE = {"stage": "s", "step": 4, "group": {"loss": 0.5, "hits": 1, "images": 8, "steps": 4}}


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: tensor})


PLACES: dict[str, bytes | None] = {
    "missing": None, "cut short": b"{", "deep": b"[" * 100_000, "a list": b"[]", "null": b"null", "a number": b"3",
    "bytes": b"\xff\xfe", "infinite": json.dumps(PLACE | {"step": math.inf}).encode(),
    **{f"step {step!r}": json.dumps(PLACE | {"step": step}).encode() for step in (-5, 3, 5, 10**18, "4", 4.0)},
    **{f"group {name}": json.dumps(PLACE | {"group": group}).encode() for name, group in
       {"null": None, "of text": PLACE["group"] | {"loss": "x"}, "of NaN": PLACE["group"] | {"loss": math.nan}}.items()},
}  # fmt: skip
STATES: dict[str, bytes | Callable[[dict[str, Tensor]], object]] = {
    "no safetensors": b"abc", "empty": b"",
    "generator short": with_tensor("rng.cpu", torch.zeros(5, dtype=torch.uint8)),
    "generator zeroed": with_tensor("rng.cpu", torch.zeros(5056, dtype=torch.uint8)),
    "generator of floats": with_tensor("rng.cpu", torch.zeros(5056)),
    "generator missing": without("rng.cpu"),
    "momentum 9999": with_tensor("momentum.9999", torch.zeros(2)),
    "momentum x": with_tensor("momentum.x", torch.zeros(2)),
    "momentum of another shape": with_tensor("momentum.0", torch.zeros(7, 7)),
    "unknown": with_tensor("other", torch.zeros(2)),
    "no network": lambda state: [state.pop(name) for name in list(state) if name.startswith("network.")],
    "NaN": lambda state: [t.fill_(math.nan) for name, t in state.items() if name.startswith("network.")],
    "infinite momentum": lambda state: state["momentum.0"].fill_(math.inf),
}  # fmt: skip


def saved_badly(run: Run, step: int, place: str = "", state: str = "") -> None:
    """A checkpoint whose digests fit what it holds."""
    trainer = toy(20)
    for at in trainer.steps():
        if at.number == step:
            break
    tensors, change = trainer.state(), STATES.get(state)
    if callable(change):
        change(tensors)
    members = {
        "state.safetensors": change if isinstance(change, bytes) else save(tensors),
        "place.json": PLACES[place] if place else json.dumps(PLACE | {"step": step}).encode(),
    }
    run.save_checkpoint(step, {name: data for name, data in members.items() if data is not None})


@pytest.mark.parametrize(("part", "kind"), [("place", kind) for kind in PLACES] + [("state", kind) for kind in STATES])
def test_a_checkpoint_that_verifies_but_cannot_be_loaded_is_one_line(tmp_path: Path, part: str, kind: str) -> None:
    run = run_in(tmp_path / "run")
    saved_badly(run, 4, **{part: kind})
    with pytest.raises(
        RunError, match=r"checkpoint 4 is damaged: .*; remove .*checkpoints to begin this stage again"
    ) as caught:
        go(toy(20), run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "kind"), [("place", "deep"), ("place", "missing"), ("state", "NaN"), ("state", "generator zeroed"),
                                            ("state", "momentum 9999")])  # fmt: skip
def test_the_checkpoint_before_one_that_cannot_be_loaded_is_gone_on_from(
    tmp_path: Path, part: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, reference = toy(20), run_in(tmp_path / "whole")
    go(whole, reference)
    run, second = run_in(tmp_path / "run"), toy(20)
    saved_badly(run, 2)
    saved_badly(run, 4, **{part: kind})
    go(second, run)
    assert weights(second) == weights(whole)
    assert "checkpoint 4 is damaged" in capsys.readouterr().err


def test_a_step_beyond_the_last_is_no_finished_student(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    members = {"state.safetensors": save(toy(20).state()), "place.json": json.dumps(PLACE | {"step": 11}).encode()}
    run.save_checkpoint(11, members)
    with pytest.raises(RunError, match="step 11 of 10"):
        go(toy(20), run)
