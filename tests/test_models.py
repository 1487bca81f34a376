"""Networks by name: sizes from the papers, stems for small images, the user's own factories."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from rkd.data import ArraySource
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import FeatureDistillation, margins
from rkd.errors import ArchitectureError
from rkd.models import STUDENTS, build
from rkd.models.infer import infer_arch
from rkd.models.keys import known_names
from rkd.network import Normalisation
from rkd.taps import TappedNetwork

ADAPTED = {
    "mobilenet": "mobilenet_v3_small",
    "mobilenet-v2": "mobilenet_v2",
    "shufflenet-v2": "shufflenet_v2_x1_0",
    "resnet18": "resnet18",
    "efficientnet_b0": "efficientnet_b0",
}


def on_meta(name: str, size: tuple[int, int], classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return build(name, classes, size)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def last_map(network: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """Height and width of the last convolution's output that is larger than the pooled one, or of the last one."""
    maps: list[tuple[int, ...]] = []

    def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        maps.append(tuple(output.shape[2:]))

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # squeeze-and-excitation has convolutions on one pixel, but no BN
            module.register_forward_hook(record)
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, *size, device="meta"))
    return maps[-1]


@pytest.mark.parametrize(
    ("name", "millions", "decimals"),
    [
        ("wrn-16-1", 0.17, 2),  # Zagoruyko and Komodakis 2016, and OFD's and AT's tables: 0.17, 0.69, 0.56, 36.5
        ("wrn-16-2", 0.69, 2),
        ("wrn-40-1", 0.56, 2),
        ("wrn-40-2", 2.2, 1),
        ("wrn-28-10", 36.5, 1),
    ],
)
def test_wide_resnets_have_the_parameters_of_the_papers(name: str, millions: float, decimals: int) -> None:
    count = parameters(on_meta(name, (32, 32))) / 1e6
    unit = 10.0**-decimals
    assert abs(count - millions) < unit, f"{count:.3f} M"


@pytest.mark.parametrize(
    ("depth", "without_shortcuts"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_the_papers_parameters_and_two_projections(depth: int, without_shortcuts: int) -> None:
    # He et al. 2016, table 6: 0.27, 0.46, 0.85 and 1.7 M with parameter-free shortcuts (option A).
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert parameters(on_meta(f"resnet{depth}", (32, 32))) == without_shortcuts + projections


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("pyramidnet-110-84", 3.8),  # Han et al. 2017, table 4
        ("pyramidnet-110-270", 28.3),
        ("pyramidnet-164-270", 27.0),  # bottlenecks from here on
        ("pyramidnet-200-240", 26.6),
        ("pyramidnet-272-200", 26.0),
    ],
)
def test_pyramidnets_have_the_parameters_of_the_paper(name: str, millions: float) -> None:
    # The authors' port rounds widths where their first code cut them off: up to 3 % more.
    assert 1 <= parameters(on_meta(name, (32, 32))) / 1e6 / millions < 1.03


def test_a_pyramidnets_shortcut_is_averaged_and_filled_up_and_its_additions_are_not_activated() -> None:
    torch.manual_seed(0)
    network = build("pyramidnet-8-6", 3, (8, 8)).eval()
    block = network.get_submodule("layer2.0")
    for name in ("bn3",):  # a branch that adds nothing
        nn.init.zeros_(block.get_parameter(f"{name}.weight"))
    x = torch.randn(2, 18, 8, 8)
    out = block(x)
    assert out.shape == (2, 20, 4, 4)
    torch.testing.assert_close(out[:, :18], x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)))
    assert not out[:, 18:].any()


@pytest.mark.parametrize(
    "name", ["pyramidnet-9-12", "pyramidnet-20-0", "pyramidnet-166-12", "pyramidnet-12-4-bottleneck"]
)
def test_a_pyramidnet_of_impossible_depth_or_width_is_refused(name: str) -> None:
    with pytest.raises(ArchitectureError, match="does not exist"):
        build(name, 10, (32, 32))


def test_a_cifar_resnet_without_projections_has_the_papers_parameters_and_skips_pixels() -> None:
    assert parameters(on_meta("resnet20-a", (32, 32))) == 269_722
    torch.manual_seed(0)
    block = build("resnet20-a", 3, (8, 8)).eval().get_submodule("layer2.0")
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("name", ["wrn-11-1", "wrn-4-1", "wrn-16-0"])
def test_a_wide_resnet_of_impossible_depth_or_width_is_refused(name: str) -> None:
    with pytest.raises(ArchitectureError, match=f"{name} does not exist"):
        build(name, 10, (32, 32))


@pytest.mark.parametrize("name", sorted(ADAPTED))
def test_at_32_pixels_the_last_feature_map_has_at_least_four_by_four(name: str) -> None:
    assert min(last_map(on_meta(name, (32, 32)), (32, 32))) >= 4


@pytest.mark.parametrize("name", ["mobilenet", "resnet18"])
def test_at_64_pixels_the_last_feature_map_has_at_least_four_by_four(name: str) -> None:
    assert min(last_map(on_meta(name, (64, 64)), (64, 64))) >= 4


@pytest.mark.parametrize("name", sorted(ADAPTED))
def test_at_224_pixels_the_network_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        original = torchvision_models.get_model(ADAPTED[name], weights=None, num_classes=10)
    built = on_meta(name, (224, 224))
    assert repr(built) == repr(original).replace(
        "momentum=0.01", "momentum=0.1"
    )  # and its running statistics are quick
    assert last_map(built, (224, 224)) == (7, 7)


def test_a_vgg_for_small_images_has_one_linear_layer() -> None:
    small = on_meta("vgg11", (32, 32))
    assert [m.in_features for m in small.modules() if isinstance(m, nn.Linear)] == [512]
    assert 9_000_000 < sum(p.numel() for p in small.parameters()) < 10_000_000
    assert sum(p.numel() for p in on_meta("vgg11", (224, 224)).parameters()) > 128_000_000


def test_torchvision_colon_name_is_left_as_it_is_at_any_size() -> None:
    with torch.device("meta"):
        original = torchvision_models.get_model("resnet18", weights=None, num_classes=10)
    assert repr(on_meta("torchvision:resnet18", (32, 32))) == repr(original)


def test_an_adapted_network_has_weights_that_work_and_is_in_train_mode() -> None:
    torch.manual_seed(0)
    network = build("resnet18", 5, (32, 32))
    assert network.training
    logits = network.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18", "mobilenet"])
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    def make() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return build(name, 4, (40, 40)).state_dict()  # a size that no other test has asked this process for

    first, second = make(), make()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "same"),
    [("mobilenet", "mobilenet_v3_small"), ("mobilenet-v3", "mobilenet_v3_small"), ("vgg16", "vgg16_bn")],
)
def test_an_alias_names_the_same_network(name: str, same: str) -> None:
    assert repr(on_meta(name, (32, 32))) == repr(on_meta(same, (32, 32)))


@pytest.mark.parametrize("student", STUDENTS, ids=lambda student: student.name)
def test_every_listed_student_exists_and_runs_at_32_pixels(student: object) -> None:
    network = on_meta(student.name, (32, 32), classes=7).eval()  # type: ignore[attr-defined]
    assert network(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "meant"), [("mobilnet", "mobilenet"), ("resnet_18", "resnet18"), ("efficentnet_b0", "efficientnet_b0")]
)
def test_a_misspelt_name_is_refused_with_the_nearest_one(name: str, meant: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"did you mean {meant}\b"):
        build(name, 10, (32, 32))


def test_a_name_like_no_other_is_refused_and_the_list_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"no network is called 'zzzzzz'.*rkd students"):
        build("zzzzzz", 10, (32, 32))


def test_timm_names_say_what_to_install_where_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArchitectureError, match="pip install timm"):
        build("timm:resnet18", 10, (32, 32))


# ------------------------------------------------------------------------------------------------- the user's own code

FACTORIES = """
from torch import nn

def sized(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, num_classes))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))

def number():
    return 7

def broken():
    raise KeyError("no weights here")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own nets.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize(("factory", "outputs"), [("sized", 6), ("fixed", 2)])
def test_a_users_factory_is_called_with_the_classes_if_it_takes_them(own: Path, factory: str, outputs: int) -> None:
    assert build(f"{own}:{factory}", 6, (4, 4))(torch.zeros(1, 3, 4, 4)).shape == (1, outputs)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("number", "returned int, expected a torch.nn.Module"),
        ("broken", "failed: KeyError: 'no weights here'"),
        ("absent", "failed: AttributeError"),
        ("", "failed: AttributeError"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(own: Path, factory: str, complaint: str) -> None:
    with pytest.raises(ArchitectureError, match=complaint):
        build(f"{own}:{factory}", 6, (4, 4))


def test_a_factory_in_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"no such file.*path/file\.py:factory"):
        build(f"{tmp_path / 'nowhere.py'}:make", 6, (4, 4))


# --------------------------------------------------------------------------------------------------- which one is this?


NAMED = [
    "wrn-10-1", "wrn-16-2", "wrn-28-4", "resnet20", "resnet32", "resnet44", "resnet56", "resnet20-a",
    "pyramidnet-110-48", "pyramidnet-200-240", "pyramidnet-20-12-bottleneck", "pyramidnet-182-12-basic",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_network_for_small_images_is_known_by_its_tensors(name: str) -> None:
    shapes = {n: tuple(t.shape) for n, t in on_meta(name, (32, 32)).state_dict().items() if "num_batches" not in n}
    assert infer_arch(shapes, (32, 32)) == (name,)


Shapes = dict[str, tuple[int, ...]]


def shapes_of(name: str) -> Shapes:
    return {n: tuple(t.shape) for n, t in on_meta(name, (32, 32)).state_dict().items() if "num_batches" not in n}


def with_linear_and_shortcut(shapes: Shapes) -> Shapes:
    """As the widely copied CIFAR ports of ResNets name their tensors."""
    return {n.replace("downsample.", "shortcut.").replace("fc.", "linear."): s for n, s in shapes.items()}


def with_residual_functions(shapes: Shapes) -> Shapes:
    """As ports with numbered stages and Sequential blocks name them: conv1.0, conv2_x.0.residual_function.0, ..."""
    places = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"}
    renamed = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            parts = ["conv1", places[parts[0]], *parts[1:]]
        elif parts[0].startswith("layer"):
            parts[0] = f"conv{int(parts[0][5:]) + 1}_x"
            parts[2:3] = ["residual_function", places[parts[2]]] if parts[2] in places else ["shortcut"]
        renamed[".".join(parts)] = shape
    return renamed


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("resnet20", with_linear_and_shortcut),
        ("resnet56", with_linear_and_shortcut),
        ("resnet20-a", with_linear_and_shortcut),
        ("resnet18", with_linear_and_shortcut),
        ("resnet50", with_linear_and_shortcut),
        ("resnet18", with_residual_functions),
        ("resnet50", with_residual_functions),
    ],
)
def test_networks_are_known_by_other_peoples_names_of_their_tensors(
    name: str, port: Callable[[Shapes], Shapes]
) -> None:
    own = shapes_of(name)
    theirs = port(own)
    assert set(theirs) != set(own)
    assert known_names(theirs) == own
    assert infer_arch(theirs, (32, 32)) == (name,)


def test_names_that_would_collide_stay_as_they_are() -> None:
    both = {"linear.weight": 1, "fc.weight": 2}
    assert known_names(both) == both


@pytest.mark.parametrize("name", ["wrn-10-1", "mobilenet-v2", "shufflenet-v2"])
def test_names_that_are_known_already_stay_as_they_are(name: str) -> None:
    assert known_names(shapes_of(name)) == shapes_of(name)


# ------------------------------------------------------------------------------------------------- pairs of the papers


@pytest.mark.promise
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("wrn-28-4", "wrn-16-4"), ("pyramidnet-200-240", "wrn-28-4"), ("resnet50", "mobilenet")],
)
def test_the_papers_pairs_train_for_a_step(teacher: str, student: str) -> None:
    size = (16, 16)
    torch.manual_seed(0)
    frozen = build(teacher, 10, size).eval().requires_grad_(requires_grad=False)
    tapped = TappedNetwork(frozen, size, frozen=True).eval()
    network = build(student, 10, size)
    rng = np.random.default_rng(0)
    source = ArraySource(rng.integers(0, 256, (4, 3, *size), dtype=np.uint8), rng.integers(0, 10, 4))
    margin = margins(tapped, frozen, [torch.randn(2, 3, *size)])
    objective = FeatureDistillation(network, tapped, size, margin)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer = Trainer(
        network, objective, source, Normalisation(), Recipe(epochs=1, batch=4, lr=0.01), torch.device("cpu")
    )
    (step,) = trainer.steps()
    assert torch.isfinite(step.loss)
    assert len(objective.pairs) >= 2
    moved = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_tensors_of_no_known_network_are_not_guessed() -> None:
    assert infer_arch({"a.weight": (3, 5), "a.bias": (3,)}, (32, 32)) == ()


@pytest.mark.parametrize("name", ["mobilenet", "mobilenet-v2", "resnet18"])
def test_running_statistics_follow_short_training(name: str) -> None:
    """After 100 steps less than a thousandth of what they started from is left in them."""
    momenta = [m.momentum for m in build(name, 3, (32, 32)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert momenta
    assert all(m is not None and (1 - m) ** 100 < 1e-3 for m in momenta)
