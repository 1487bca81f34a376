"""Taps are before the activation, one a stage, and cuts: what replaces them decides everything that follows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.errors import ArchitectureError, ConfigError
from rkd.models import build
from rkd.taps import Tap, TappedNetwork, pair_taps

SIZE = (32, 32)
NETWORKS = (
    "wrn-10-1", "resnet20", "resnet18", "mobilenet", "mobilenet-v2", "shufflenet-v2", "squeezenet1_1",
    "pyramidnet-8-6", "pyramidnet-11-6-bottleneck", "resnet20-a", "resnet34",
)  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Callable[[str], nn.Module]:
    """A network in eval mode whose BNs are not the identity."""
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            torch.manual_seed(0)
            module = build(name, 5, SIZE).eval()
            for bn in module.modules():
                if isinstance(bn, nn.BatchNorm2d):
                    assert bn.running_mean is not None
                    assert bn.running_var is not None
                    nn.init.normal_(bn.running_mean, 0, 0.1)
                    nn.init.uniform_(bn.running_var, 0.5, 1.5)
                    nn.init.uniform_(bn.weight, 0.5, 1.5)
                    nn.init.normal_(bn.bias, 0, 0.2)
            made[name] = module
        return copy.deepcopy(made[name])

    return get


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach(), b.detach()
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


# ------------------------------------------------------------------------------------------------------ where they are


def test_a_wide_resnet_is_tapped_at_the_bn_that_ends_each_stage(network: Callable[[str], nn.Module]) -> None:
    plain = network("wrn-10-1")
    tapped = TappedNetwork(plain, SIZE)
    assert [tap.shape for tap in tapped.taps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [tap.bn for tap in tapped.taps] == ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
    assert all(tap.pre_activation and "before the activation" in str(tap) for tap in tapped.taps)
    seen: dict[str, Tensor] = {}
    for tap in tapped.taps:
        assert tap.bn is not None
        plain.get_submodule(tap.bn).register_forward_hook(
            lambda _m, _i, output, name=tap.bn: seen.__setitem__(name, output.clone())
        )
    plain(images())
    _, values = tapped(images())
    for tap, value in zip(tapped.taps, values, strict=True):
        assert torch.equal(value, seen[str(tap.bn)])


def test_a_resnet18_is_tapped_at_the_addition_before_the_last_relu_of_each_stage(
    network: Callable[[str], nn.Module],
) -> None:
    plain = network("resnet18")
    tapped = TappedNetwork(plain, SIZE)
    assert [tap.channels for tap in tapped.taps] == [64, 128, 256, 512]
    assert all(tap.pre_activation and tap.bn is None for tap in tapped.taps)
    after: list[Tensor] = []
    for index in (1, 2, 3, 4):
        plain.get_submodule(f"layer{index}").register_forward_hook(lambda _m, _i, output: after.append(output.clone()))
    plain(images())
    _, values = tapped(images())
    for value, activated in zip(values, after, strict=True):
        assert (value < 0).any(), "an in-place ReLU has overwritten the tapped value"
        assert torch.equal(functional.relu(value), activated)


def test_a_mobilenet_is_tapped_once_a_resolution(network: Callable[[str], nn.Module]) -> None:
    taps = TappedNetwork(network("mobilenet"), SIZE).taps
    areas = [tap.height * tap.width for tap in taps]
    assert len(taps) >= 2
    assert areas == sorted(set(areas), reverse=True)
    assert taps[-1].pre_activation
    assert taps[-1].shape[1:] == (4, 4)


def test_where_no_activation_follows_the_stage_output_is_tapped_and_said_so(
    network: Callable[[str], nn.Module],
) -> None:
    taps = TappedNetwork(network("shufflenet-v2"), SIZE).taps
    assert len(taps) >= 3
    shuffled = [tap for tap in taps if not tap.pre_activation]
    assert shuffled
    assert all("stage output" in str(tap) for tap in shuffled)


@pytest.mark.parametrize("name", NETWORKS)
def test_tapping_changes_no_logit_and_no_tensor_of_the_network(name: str, network: Callable[[str], nn.Module]) -> None:
    plain = network(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    expected = plain(images())
    logits, values = TappedNetwork(plain, SIZE).eval()(images())
    assert torch.equal(logits, expected)
    assert all(value.shape[0] == 3 for value in values)
    assert torch.equal(plain(images()), expected)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tap_is_a_cut_so_making_it_constant_makes_all_logits_the_same(
    name: str, network: Callable[[str], nn.Module]
) -> None:
    tapped = TappedNetwork(network(name), SIZE).eval()
    assert len(tapped.taps) >= 2
    free, _ = tapped(images())
    assert (free[0] - free[1]).abs().max() > 0
    for index in range(len(tapped.taps)):
        tapped.set_edits([torch.ones_like if i == index else None for i in range(len(tapped.taps))])
        logits, values = tapped(images())
        assert torch.equal(values[index], torch.ones_like(values[index]))
        assert close(logits[0], logits[1], 1e-6), tapped.taps[index]
    tapped.set_edits([None] * len(tapped.taps))
    assert torch.equal(tapped(images())[0], free)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_is_folded_within_rounding_and_leaves_the_original_alone(
    name: str, network: Callable[[str], nn.Module]
) -> None:
    plain = network(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    expected_logits, expected = TappedNetwork(plain, SIZE).eval()(images())
    frozen = TappedNetwork(plain, SIZE, frozen=True).eval()
    logits, values = frozen(images())
    assert close(logits, expected_logits, 1e-4)
    assert all(close(a, b, 1e-4) for a, b in zip(values, expected, strict=True))
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(plain(images()), expected_logits)
    if name == "resnet18":  # each BN follows a convolution there: none is left to be run
        run = [str(node.target) for node in frozen.network.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
        assert not any("bn" in target or "downsample.1" in target for target in run)


@pytest.mark.parametrize(
    ("name", "channels", "pre_activation"),
    [
        ("resnet50", [256, 512, 1024, 2048], [True] * 4),
        ("resnet56", [16, 32, 64], [True] * 3),
        ("vgg16", [256, 512, 512], [True] * 3),
        ("mobilenet_v3_large", [72, 240, 672, 960], [True] * 4),
        ("pyramidnet-20-12-bottleneck", [80, 96, 112], [False, False, True]),
    ],
)
def test_the_other_families_are_tapped_once_a_stage_as_well(
    name: str, channels: list[int], pre_activation: list[bool]
) -> None:
    with torch.device("meta"):
        taps = TappedNetwork(build(name, 5, SIZE), SIZE).taps
    assert [tap.channels for tap in taps] == channels
    assert [tap.pre_activation for tap in taps] == pre_activation
    areas = [tap.height for tap in taps]
    assert areas == sorted(set(areas), reverse=True)


@pytest.mark.parametrize("kind", ["traced", "hooked"])
@pytest.mark.parametrize(("only", "kept"), [((-1,), [-1]), ((0,), [0]), ((1, 0), [0, 1]), ((), [])])
def test_only_the_taps_that_are_asked_for_are_there(kind: str, only: tuple[int, ...], kept: list[int]) -> None:
    torch.manual_seed(0)
    plain = Moody().eval() if kind == "hooked" else build("wrn-10-1", 5, SIZE).eval()
    logits, every = TappedNetwork(plain, SIZE).eval()(images())
    taps = TappedNetwork(plain, SIZE).taps
    tapped = TappedNetwork(plain, SIZE, only=only).eval()
    assert tapped.taps == tuple(taps[i] for i in kept)
    some, values = tapped(images())
    assert torch.equal(some, logits)
    assert all(torch.equal(value, every[i]) for value, i in zip(values, kept, strict=True))
    with pytest.raises(ConfigError, match=rf"tap 9 was asked for; the network has {len(taps)} taps"):
        TappedNetwork(plain, SIZE, only=(8,))


def test_gradients_reach_the_original_parameters_and_flow_through_the_edits(
    network: Callable[[str], nn.Module],
) -> None:
    plain = network("wrn-10-1")
    tapped = TappedNetwork(plain, SIZE)
    scale = torch.ones((), requires_grad=True)
    tapped.set_edits([lambda x: x * scale, None, None])
    logits, _ = tapped(images())
    logits.square().sum().backward()
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 0
    assert all(p.grad is not None for p in plain.parameters())


def test_the_mode_of_the_network_survives_tapping() -> None:
    plain = build("resnet20", 5, SIZE).train()
    TappedNetwork(plain, SIZE)
    assert plain.training
    assert all(module.training for module in plain.modules())


# ----------------------------------------------------------------------------------------- networks that resist tracing


class Moody(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.first = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        if float(x.detach().mean()) > 100:
            x = -x
        logits: Tensor = self.head(self.second(x).mean((2, 3)))
        return logits


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Moody()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("kind", [Moody, Wrapped])
def test_an_untraceable_network_is_tapped_at_its_outermost_modules(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = kind().eval()
    tapped = TappedNetwork(plain, SIZE).eval()
    prefix = "inner." if kind is Wrapped else ""
    assert [tap.name for tap in tapped.taps] == [f"{prefix}first", f"{prefix}second"]
    assert [tap.shape for tap in tapped.taps] == [(6, 16, 16), (8, 8, 8)]
    assert not any(tap.pre_activation for tap in tapped.taps)
    logits, values = tapped(images())
    assert torch.equal(logits, plain(images()))
    assert [tuple(value.shape[1:]) for value in values] == [(6, 16, 16), (8, 8, 8)]
    tapped.set_edits([None, torch.ones_like])
    edited, _ = tapped(images())
    assert close(edited[0], edited[1], 1e-6)


def test_edits_of_an_untraceable_network_do_not_leak_into_the_network_itself() -> None:
    torch.manual_seed(0)
    plain = Moody().eval()
    expected = plain(images())
    tapped = TappedNetwork(plain, SIZE).eval()
    tapped.set_edits([torch.zeros_like, torch.zeros_like])
    tapped(images())
    assert torch.equal(plain(images()), expected)
    assert not any(module._forward_hooks for module in plain.modules())


def test_a_network_that_fails_at_that_size_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="does not run on 8x8 images"):
        TappedNetwork(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(99, 2)), (8, 8))


class InPlace(nn.Module):
    """Overwrites what it has just computed in every way that there is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.b(self.a(x)))
        if self.how == "module":
            x = self.act(x)
        elif self.how == "function":
            x = functional.relu(x, inplace=True)
        elif self.how == "function_":
            x = torch.relu_(x)
        elif self.how == "method_":
            x = x.relu_()
        elif self.how == "iadd":
            x += 1
        elif self.how == "imul":
            x *= 2
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("how", ["module", "function", "function_", "method_", "iadd", "imul"])
def test_what_is_computed_in_place_after_a_tap_does_not_change_the_tapped_value(how: str) -> None:
    torch.manual_seed(0)
    plain = InPlace(how).eval()
    expected = plain(images())
    before = plain.bn(plain.b(plain.a(images())))
    activated = how in ("module", "function", "function_", "method_")
    tapped = TappedNetwork(plain, SIZE).eval()
    logits, values = tapped(images())
    assert torch.equal(logits, expected)
    if activated:
        assert tapped.taps[0].pre_activation
        assert torch.equal(values[0], before)


# -------------------------------------------------------------------------------------------------------------- pairing


def tap(height: int, channels: int = 8) -> Tap:
    return Tap(f"t{height}", channels, height, height, pre_activation=True)


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        ((32, 16, 8), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),
        ((32, 16, 8), (16, 8, 4), [(1, 0), (2, 1)]),
        ((32, 8), (32, 16, 8), [(0, 0), (1, 2)]),
        ((7, 5), (8, 4), [(1, 1)]),  # nothing agrees: the last ones
        ((), (8,), []),
        ((8,), (), []),
    ],
)
def test_taps_are_paired_by_resolution(
    teacher: tuple[int, ...], student: tuple[int, ...], pairs: list[tuple[int, int]]
) -> None:
    assert pair_taps([tap(h) for h in teacher], [tap(h, 4) for h in student]) == pairs


def test_not_quite_square_taps_are_paired_by_both_sides() -> None:
    teacher = [Tap("a", 4, 8, 16, pre_activation=True), Tap("b", 4, 4, 8, pre_activation=True)]
    student = [Tap("c", 4, 16, 8, pre_activation=True), Tap("d", 4, 4, 8, pre_activation=True)]
    assert pair_taps(teacher, student) == [(1, 1)]
