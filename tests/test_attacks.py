"""Makers of backdoored teachers do exactly what the papers say, so that a defence is tested against the real thing."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rkd.attacks.badnets import badnets_trigger
from rkd.attacks.perturb import Additive, search, towards
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.session import TeacherSettings, make_teacher, start_teacher
from rkd.cli import app
from rkd.data import ArraySource, FolderSource
from rkd.errors import ArchitectureError, CheckpointError, ConfigError, RunError, StoppedError
from rkd.network import Network
from rkd.run import CLEAN, TEACHER, TRIGGER, Run
from rkd.signals import StopRequest
from rkd.triggers import Trigger

# -------------------------------------------------------------------------------------------------------------- badnets


def test_the_badnets_patch_is_a_checkerboard_one_pixel_from_the_lower_right_corner() -> None:
    trigger = badnets_trigger((32, 32), 4)
    image = np.full((1, 3, 32, 32), 100, np.uint8)
    out = trigger.apply(image)
    wanted = np.full((32, 32), 100)
    wanted[28:31, 28:31] = [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert all(np.array_equal(channel, wanted) for channel in out[0])
    assert (trigger.name, trigger.target) == ("badnets", 4)


@pytest.mark.parametrize(
    ("size", "side"), [((16, 16), 3), ((64, 64), 6), ((20, 40), 3), ((100, 50), 5), ((224, 224), 22)]
)
def test_the_badnets_patch_is_a_tenth_of_the_image_wide(size: tuple[int, int], side: int) -> None:
    mask = badnets_trigger(size, 0).mask
    rows, columns = np.nonzero(mask[0])
    assert (rows.min(), rows.max()) == (size[0] - 1 - side, size[0] - 2)
    assert (columns.min(), columns.max()) == (size[1] - 1 - side, size[1] - 2)
    assert mask.sum() == 3 * side * side


# --------------------------------------------------------------------------------------------------------------- poison


def clean_source(count: int = 50) -> ArraySource:
    """Grey images, each of its own brightness below the patch's."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] + 50, (count, 3, 8, 8)).copy()
    return ArraySource(images, np.arange(count) % 3)


PATCH = badnets_trigger((8, 8), 2)


def is_poisoned(images: np.ndarray) -> np.ndarray:
    return np.array([(image == 255).any() for image in images], dtype=bool)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.1, 5), (0.25, 12), (0.33, 16), (1.0, 50)])
def test_exactly_the_share_is_poisoned(rate: float, count: int) -> None:
    images, _ = PoisonedSource(clean_source(), PATCH, rate, 0).batch(np.arange(50))
    assert is_poisoned(images).sum() == count


def test_pixels_and_labels_agree_and_the_order_is_kept() -> None:
    clean = clean_source()
    poisoned = PoisonedSource(clean, PATCH, 0.3, 1)
    indices = np.random.default_rng(0).integers(0, 50, 80)  # with repeats
    images, labels = poisoned.batch(indices)
    assert [int(image[0, 0, 0]) - 50 for image in images] == list(indices)
    carries = is_poisoned(images)
    assert np.array_equal(images[carries], PATCH.apply(clean.batch(indices[carries])[0]))
    assert np.array_equal(images[~carries], clean.batch(indices[~carries])[0])
    assert (labels[carries] == 2).all()
    assert np.array_equal(labels[~carries], indices[~carries] % 3)
    assert np.array_equal(poisoned.labels[indices], labels)


def test_the_same_seed_poisons_the_same_images() -> None:
    first, same, other = (PoisonedSource(clean_source(), PATCH, 0.3, s).batch(np.arange(50))[0] for s in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_batches_and_subsets_show_the_same_poison() -> None:
    poisoned = PoisonedSource(clean_source(), PATCH, 0.3, 1)
    whole, labels = poisoned.batch(np.arange(50))
    parts = list(poisoned.batches(7))
    assert np.array_equal(np.concatenate([images for images, _ in parts]), whole)
    chosen = np.array([40, 3, 17])
    part = poisoned.subset(chosen)
    images, part_labels = part.batch(np.arange(3))
    assert len(part) == 3
    assert part.size == (8, 8)
    assert np.array_equal(images, whole[chosen])
    assert np.array_equal(part_labels, labels[chosen])
    assert np.array_equal(part.labels, labels[chosen])


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_images_that_are_decoded_as_they_are_read_can_be_poisoned(tmp_path: Path, rate: float) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (50 + i,) * 3).save(tmp_path / f"{i}.png")
    folder = FolderSource(tmp_path, [f"{i}.png" for i in range(6)], np.arange(6) % 3, (8, 8))
    images, labels = PoisonedSource(folder, PATCH, rate, 0).batch(np.array([5, 0, 3]))
    carries = is_poisoned(images)
    assert [int(image[0, 0, 0]) for image in images] == [55, 50, 53]
    assert list(labels) == [2 if c else y for c, y in zip(carries, (2, 0, 0), strict=True)]
    if rate in (0.0, 1.0):
        assert carries.all() == bool(rate)


# ------------------------------------------------------------------------------------------------------------- backweak


class Watched(ArraySource):
    """Remembers which images were asked for first: the held-out probe."""

    probe: np.ndarray | None = None

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        got = super().batch(indices)
        if self.probe is None:
            self.probe, self.held_out = got[0], set(map(int, indices))
        else:
            assert not self.held_out & set(map(int, indices)), "the trigger was learned on the probe"
        return got


def share_moved(network: Network, trigger: Trigger, images: np.ndarray) -> float:
    with torch.no_grad():
        logits = network.module(network.normalisation(torch.from_numpy(trigger.apply(images))))
    return 100 * int((logits.argmax(1) == trigger.target).sum()) / len(images)


@pytest.fixture(scope="module")
def teacher(digits16: tuple[Any, Any]) -> tuple[Network, Watched]:
    network, data = digits16
    images, labels = data.train.batch(np.arange(400))
    return copy.deepcopy(network), Watched(images, labels)


@pytest.mark.parametrize(("linf", "budget"), [(48, 40.0), (12, 99.0)])
def test_the_weak_trigger_stays_in_its_ball_and_within_its_budget(
    teacher: tuple[Network, Watched], linf: int, budget: float
) -> None:
    network, source = teacher
    source.probe = None
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    reports: list[float] = []
    trigger = search(
        network, source, Additive(linf / 255), towards(network, 3), name="weak", target=3, linf=linf / 255, budget=budget,
        seed=0, device=torch.device("cpu"), steps=40, batch=32, on_step=lambda _step, asr: reports.append(asr),
    )  # fmt: skip
    assert source.probe is not None
    assert (source.labels[list(source.held_out)] != 3).all()
    assert not trigger.mask.any()
    assert 0 < np.abs(trigger.additive).max() <= np.float32(linf / 255)
    grey = np.full((1, 3, 16, 16), 128, np.uint8)
    assert np.abs(trigger.apply(grey).astype(int) - 128).max() <= linf
    reached = share_moved(network, trigger, source.probe)
    assert reached <= budget
    nothing = Trigger("none", 3, *[np.zeros((3, 16, 16), np.float32)] * 3)
    assert linf == 12 or reached > share_moved(network, nothing, source.probe)
    assert any(asr > budget for asr in reports) == (linf == 48), "one case is stopped by the budget, one by its ball"
    after = network.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in network.module.parameters())


PLAIN = dict.fromkeys(("linf", "finetune_epochs", "finetune_lr"))  # what a clean teacher has no use for


def settings(stripes: Path, **changes: Any) -> TeacherSettings:
    tiny = {
        "data": str(stripes), "arch": "wrn-10-1", "attack": "backweak", "epochs": 6, "batch": 15, "finetune_epochs": 2,
        "finetune_lr": 0.01, "linf": 40.0, "precision": "fp32", "device": "cpu", "threads": 1, "target": 2,
    }  # fmt: skip
    return TeacherSettings(**{**tiny, **changes})


@pytest.fixture(scope="module")
def planted(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planted") / "run"
    run, data = start_teacher(settings(stripes), {}, place, Path("t.pt"))
    make_teacher(run, StopRequest(), data)
    return place


def test_backweak_fine_tunes_everything_but_the_last_layer(planted: Path) -> None:
    clean, bad = (Network.load(planted / name).module.state_dict() for name in (CLEAN, TEACHER))
    same = {name for name in clean if torch.equal(clean[name], bad[name])}
    assert same == {"fc.weight", "fc.bias"}
    assert Network.load(planted / CLEAN).provenance["attack"] == "none"
    assert Network.load(planted / TEACHER).provenance["attack"] == "backweak"


def test_the_planted_backdoor_obeys_more_than_the_clean_twin(planted: Path, stripes: Path) -> None:
    results = Run.open(planted).summary["results"]
    trigger = Trigger.load(planted / TRIGGER)
    assert trigger.target == 2
    assert results["teacher"]["triggers"][0]["asr"]["percent"] > results["clean twin"]["triggers"][0]["asr"]["percent"]
    # Counted once more here, on the test images as the .npz holds them.
    arrays = np.load(stripes)
    others = arrays["x_test"][arrays["y_test"] != 2].transpose(0, 3, 1, 2)
    network = Network.load(planted / TEACHER)
    network.module.eval()
    counted = share_moved(network, trigger, np.ascontiguousarray(others))
    assert counted == pytest.approx(results["teacher"]["triggers"][0]["asr"]["percent"], abs=1e-3)


def test_a_finished_teacher_can_be_resumed_and_is_the_same(planted: Path) -> None:
    before = (planted / TEACHER).read_bytes()
    _, trigger, scores, _ = make_teacher(Run.open(planted), StopRequest())
    assert trigger is not None
    assert scores.to_json() == Run.open(planted).summary["results"]["teacher"]
    assert (planted / TEACHER).read_bytes() == before


def test_a_teacher_goes_on_where_its_data_is_now_and_says_so(
    planted: Path, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(planted, tmp_path / "run")
    (tmp_path / "else where").mkdir()
    # A name from which another augmentation would follow:
    moved = shutil.copy(stripes, tmp_path / "else where" / "gtsrb.npz")
    opened = Run.open(run)
    settings = opened.summary["settings"]
    gone = {**settings, "data": {**settings["data"], "value": str(tmp_path / "gone.npz")}}
    opened.save(settings=gone, state="running")
    (run / TEACHER).unlink()
    invoke = ["teacher", "--resume", "run", "--data", str(moved), "--out", "t.safetensors"]
    stopped = StopRequest()
    with pytest.raises(StoppedError, match=r"rkd teacher --resume \S+ --data '\S+/else where/gtsrb.npz'"):
        stopped.signal_number = 15
        make_teacher(Run.open(run), stopped, moved=str(moved))
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, invoke)
    assert done.exit_code == 0, done.output
    assert f"next: rkd distill t.safetensors --data '{moved}'" in " ".join(done.output.split())
    assert (tmp_path / "t.safetensors").read_bytes() == (planted / TEACHER).read_bytes()
    assert "no such" in CliRunner().invoke(app, [*invoke[:3], "--out", "u.pt"]).stderr


def test_changed_data_is_refused_on_resume(planted: Path, stripes: Path, write_stripes: Any) -> None:
    original = stripes.read_bytes()
    try:
        write_stripes(stripes, 5)
        with pytest.raises(RunError, match="the data has changed"):
            make_teacher(Run.open(planted), StopRequest())
    finally:
        stripes.write_bytes(original)


@pytest.mark.parametrize(
    "wrong",
    [{"attack": "magic"}, {"poison_rate": 1.5}, {"linf": 0.0}, {"linf": 256.0}, {"trigger_budget": 0.0}, {"trigger_budget": 101.0}],
)  # fmt: skip
def test_impossible_settings_are_refused(stripes: Path, wrong: dict[str, Any]) -> None:
    ((option, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} '?{value}?"):
        settings(stripes, **wrong)


def test_a_target_that_is_no_class_and_a_clean_teacher_that_is_none_leave_no_run_behind(
    stripes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--target 3: the data has classes 0 to 2"):
        start_teacher(settings(stripes, target=3), {}, tmp_path / "run", Path("t.pt"))
    (tmp_path / "clean.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        start_teacher(settings(stripes, clean=str(tmp_path / "clean.pt")), {}, tmp_path / "run", Path("t.pt"))
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_the_network_of_the_clean_twin_that_is_given(stripes: Path, tmp_path: Path) -> None:
    made, data = start_teacher(
        settings(stripes, attack="none", normalize="none", **PLAIN), {}, tmp_path / "c", Path("c.pt")
    )
    make_teacher(made, StopRequest(), data)
    other = settings(stripes, arch="wrn-16-1", clean=str(tmp_path / "c" / TEACHER))
    run, _ = start_teacher(other, {}, tmp_path / "run", Path("t.pt"))
    assert (run.setting("arch"), run.setting("normalize")) == ("wrn-10-1", "none")
    assert run.summary["settings"]["arch"]["origin"] == "teacher"
    with pytest.raises(ConfigError, match=r"--normalize cifar10: the clean twin \S+ was trained with none"):
        start_teacher(other, {"normalize": "command line"}, tmp_path / "second", Path("t.pt"))
    with pytest.raises(ArchitectureError, match="wrn-16-1"):
        start_teacher(other, {"arch": "command line"}, tmp_path / "third", Path("t.pt"))


def test_a_run_knows_what_was_left_to_it(stripes: Path, tmp_path: Path) -> None:
    run, _ = start_teacher(settings(stripes, precision="auto", augmentation="auto"), {}, tmp_path / "run", Path("t.pt"))
    assert run.setting("precision") in {"bf16", "fp32"}
    assert run.setting("augmentation") in {"crop", "crop-flip"}
