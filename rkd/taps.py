"""Where a network is tapped for feature distillation, found from the network itself.

A tap is the end of a resolution stage, before the activation (Heo et al., "A Comprehensive Overhaul of Feature
Distillation", ICCV 2019): the output of the last BN of the stage in BN-ReLU networks, of the last addition in networks
whose ReLU follows it. It must be a *cut* of the network, a value through which all later computation passes, so that
what replaces it there feeds the later stages.

The network is traced with torch.fx. Where no activation follows a stage's last cut (ShuffleNet's channel shuffle), the
stage's output itself is tapped. Where a network cannot be traced, the outputs of its outermost modules are taken.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rkd.errors import ArchitectureError, ConfigError

T = TypeVar("T")
Edit = Callable[[Tensor], Tensor]

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Mish, nn.Hardtanh,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = frozenset(
    {
        functional.relu, functional.relu_, functional.relu6, functional.hardswish, functional.silu, functional.gelu,
        functional.leaky_relu, functional.elu, functional.mish, functional.hardtanh, torch.relu, torch.relu_,
    }
)  # fmt: skip
_ACTIVATION_METHODS = frozenset({"relu", "relu_"})
_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add})
_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul})
_KEEP_NOUGHT = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d)
_SHAPE_METHODS = frozenset({"size", "dim", "numel"})


@dataclass(frozen=True)
class Tap:
    """One place in a network.

    Attributes:
        name: the traced node's or the module's name.
        channels, height, width: of the value there.
        pre_activation: whether an activation follows; otherwise it is the stage's output.
        bn: path of the BatchNorm2d whose output it is, if it is one's.
    """

    name: str
    channels: int
    height: int
    width: int
    pre_activation: bool
    bn: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        kind = "before the activation" if self.pre_activation else "stage output, no pre-activation there"
        return f"{self.name} ({self.channels}x{self.height}x{self.width}, {kind})"


class TapPoint(nn.Module):
    """Stands at a tap: lets a value through, keeps it, and replaces it where an edit is set."""

    def __init__(self) -> None:
        super().__init__()
        self.edit: Edit | None = None
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if self.edit is not None:
            x = self.edit(x)
        self.value = x
        return x


class TappedNetwork(nn.Module):
    """A network with its taps; it shares the parameters of the network that it was made from.

    Args:
        network: any network of images (N, 3, H, W) to logits.
        size: height and width of its images in pixels.
        frozen: the network stays in eval mode and its weights as they are: BNs are folded into the convolutions
            before them, which makes it faster.
        only: which of its taps to have, counted from 0 at the input, from -1 at the end; all by default.

    Attributes:
        taps: in the order of the network, resolutions falling.

    Raises:
        ArchitectureError: the network does not run on such images.
        ConfigError: it has fewer taps than `only` asks for.
    """

    def __init__(
        self, network: nn.Module, size: tuple[int, int], *, frozen: bool = False, only: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.taps: tuple[Tap, ...]
        self._points: list[TapPoint]
        self.network: nn.Module
        self._hooked: list[nn.Module] = []
        graph_module = _trace(network, size)
        if graph_module is not None:
            self.network = graph_module
            self.taps, self._points = _insert_taps(graph_module, only)
            if frozen:
                _fold_bn(graph_module)
        else:
            self.network = network
            self.taps, self._points, self._hooked = _hook_taps(network, size, only)

    def set_edits(self, edits: Sequence[Edit | None]) -> None:
        """Replace each tap's value by `edit(value)` from now on; None leaves it as it is."""
        for point, edit in zip(self._points, edits, strict=True):
            point.edit = edit

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (N, 3, H, W), normalised, to logits (N, classes) and the value at each tap (N, C, H, W)."""
        handles = [m.register_forward_hook(_through(p)) for m, p in zip(self._hooked, self._points, strict=False)]
        try:  # the network itself stays as it is for whoever else uses it
            logits = self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        features = []
        for point in self._points:
            assert point.value is not None  # noqa: S101  (the network has just run)
            features.append(point.value)
            point.value = None
        return logits, features


def pair_taps(teacher: Sequence[Tap], student: Sequence[Tap]) -> list[tuple[int, int]]:
    """Pair taps of equal resolution: indices into `teacher` and `student`, resolutions falling.

    Where no resolution agrees, the last tap of each is paired; the student's feature is then resized.
    """
    by_size = {(tap.height, tap.width): index for index, tap in enumerate(student)}
    pairs = [(i, by_size[tap.height, tap.width]) for i, tap in enumerate(teacher) if (tap.height, tap.width) in by_size]
    if not pairs and teacher and student:
        pairs = [(len(teacher) - 1, len(student) - 1)]
    return pairs


def channel_writers(network: nn.Module, size: tuple[int, int]) -> tuple[str, ...]:
    """Modules that make the last tap: with weight and bias of a channel at nought in all of them, it is nought there.

    Raises:
        ArchitectureError: the last tap is not made channel by channel, or the network cannot be traced.
    """
    graph_module = _trace(network, size)
    ends = _stage_ends(graph_module.graph) if graph_module is not None else []
    if not ends:
        raise ArchitectureError(
            "no stage was found in the network whose channels could be pruned; use --method finetune+ofd"
        )
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    waiting = [ends[-1][0]]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = _module(node)
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d) and module.weight is not None:
            found[str(node.target)] = None
        elif _is_activation(node) or isinstance(module, _KEEP_NOUGHT):
            waiting.append(node.all_input_nodes[0])
        elif node.op == "call_function" and node.target in _ADDITIONS:
            waiting += node.all_input_nodes
        elif node.op == "call_function" and node.target in _PRODUCTS:
            waiting += [n for n in node.all_input_nodes if _shape(n) == _shape(node)][:1]
        else:
            raise ArchitectureError(
                f"the channels of the last stage cannot be pruned, {node.name} mixes them; use --method finetune+ofd"
            )
    return tuple(found)


def _trace(network: nn.Module, size: tuple[int, int]) -> fx.GraphModule | None:
    """Trace and annotate shapes; None where the network's code cannot be traced."""
    training = network.training
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        network.eval()
        example = torch.zeros(2, 3, *size, device=device)
        with torch.no_grad():
            network(example)
    except Exception as error:
        height, width = size
        raise ArchitectureError(f"the network does not run on {height}x{width} images: {error}") from error
    finally:
        network.train(training)
    try:
        graph_module = fx.symbolic_trace(network)
        with torch.no_grad():
            ShapeProp(graph_module.eval()).propagate(example)
    except Exception:  # noqa: BLE001  (tracing runs the network's own code on proxies: it may raise anything)
        return None
    finally:
        network.train(training)
    graph_module.train(training)
    return graph_module


def _point_name(index: int) -> str:
    return f"rkd_tap_{index}"


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return () if meta is None or not hasattr(meta, "shape") else tuple(meta.shape)


def _cuts(graph: fx.Graph) -> list[fx.Node]:
    """Feature maps through which all later computation passes, in order."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    found, reach, reached = [], 0, set()
    for i, node in enumerate(nodes):
        if node.op == "placeholder" or (
            any(argument in reached for argument in node.all_input_nodes) and _is_data(node)
        ):
            reached.add(node)
        if node not in reached:
            continue
        if reach <= i and node.op != "placeholder" and len(_shape(node)) == 4:
            found.append(node)
        reach = max([reach, *(position[user] for user in node.users if _is_data(user))])
    return found


def _is_data(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in (getattr, operator.getitem):
        return bool(_shape(node))
    return not (node.op == "call_method" and node.target in _SHAPE_METHODS)


def _module(node: fx.Node) -> nn.Module | None:
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


def _is_activation(node: fx.Node) -> bool:
    return (
        isinstance(_module(node), _ACTIVATIONS)
        or (node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS)
        or (node.op == "call_method" and node.target in _ACTIVATION_METHODS)
    )


def _stage_ends(graph: fx.Graph) -> list[tuple[fx.Node, bool]]:
    """The last cut of each resolution, taken before its activation where it is one; whether it was."""
    cuts = _cuts(graph)
    cut_set = set(cuts)
    last: dict[tuple[int, ...], fx.Node] = {_shape(node)[2:]: node for node in cuts}
    convolutions: dict[tuple[int, ...], int] = {}
    for node in graph.nodes:
        if isinstance(_module(node), nn.Conv2d):
            convolutions[_shape(node)[2:]] = convolutions.get(_shape(node)[2:], 0) + 1
    ends = []
    for resolution, node in last.items():
        if max(resolution) < 2 or convolutions.get(resolution, 0) < 2:  # a stem's single convolution is no stage
            continue
        before = node.all_input_nodes[0]
        if _is_activation(node) and before in cut_set and _shape(before) == _shape(node):
            ends.append((before, True))
        else:
            ends.append((node, False))
    return ends


def _chosen(found: Sequence[T], only: Sequence[int] | None) -> list[T]:
    """Those of the places found that are asked for."""
    if only is None:
        return list(found)
    if bad := [i for i in only if not -len(found) <= i < len(found)]:
        raise ConfigError(
            f"tap {bad[0] + 1 if bad[0] >= 0 else bad[0]} was asked for; the network has {len(found)} taps"
        )
    wanted = {i % len(found) for i in only}
    return [place for i, place in enumerate(found) if i in wanted]


def _insert_taps(graph_module: fx.GraphModule, only: Sequence[int] | None) -> tuple[tuple[Tap, ...], list[TapPoint]]:
    graph = graph_module.graph
    taps, points = list[Tap](), list[TapPoint]()
    for index, (node, pre_activation) in enumerate(_chosen(_stage_ends(graph), only)):
        bn = str(node.target) if isinstance(_module(node), nn.BatchNorm2d) else None
        channels, height, width = _shape(node)[1:]
        taps.append(Tap(node.name, channels, height, width, pre_activation, bn))
        users = list(node.users)
        name = _point_name(index)
        points.append(TapPoint())
        graph_module.add_submodule(name, points[-1])
        with graph.inserting_after(node):
            point = graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, point)
            _never_in_place(user)
    graph.lint()
    graph_module.recompile()
    return tuple(taps), points


def _fold_bn(graph_module: fx.GraphModule) -> None:
    """Fold each BN into the convolution before it where nothing else reads that convolution."""
    for index, node in enumerate(list(graph_module.graph.nodes)):
        bn = _module(node)
        before = node.all_input_nodes[0] if isinstance(bn, nn.BatchNorm2d) else None
        convolution = _module(before) if before is not None else None
        if before is None or not isinstance(convolution, nn.Conv2d) or len(before.users) > 1:
            continue
        assert isinstance(bn, nn.BatchNorm2d)  # noqa: S101  (for the type checker)
        if bn.running_mean is None:
            continue
        name = f"rkd_folded_{index}"
        graph_module.add_submodule(name, fuse_conv_bn_eval(convolution.eval(), bn.eval()))
        before.target = name
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _never_in_place(node: fx.Node) -> None:
    """An in-place activation would overwrite the value that the tap keeps."""
    module = _module(node)
    if module is not None and hasattr(module, "inplace"):
        setattr(module, "inplace", False)  # noqa: B010  (a plain attribute that nn.Module's types do not know)
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_method" and node.target == "relu_":
        node.target = "relu"
    if node.op == "call_function" and node.target in (functional.relu_, torch.relu_):
        node.target = torch.relu
    if node.op == "call_function" and node.target in (operator.iadd, operator.imul):
        node.target = operator.add if node.target is operator.iadd else operator.mul


def _hook_taps(
    network: nn.Module, size: tuple[int, int], only: Sequence[int] | None
) -> tuple[tuple[Tap, ...], list[TapPoint], list[nn.Module]]:
    """Taps of a network that cannot be traced: the outputs of its outermost modules, the last at each resolution."""
    outermost = network
    while len(children := list(outermost.children())) == 1:
        outermost = children[0]
    prefix = next(name for name, module in network.named_modules() if module is outermost)
    seen: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.append((name, module, tuple(output.shape)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in outermost.named_children()]
    training = network.training
    try:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        with torch.no_grad():
            network.eval()(torch.zeros(2, 3, *size, device=device))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    last = {shape[2:]: (name, module, shape) for name, module, shape in seen if max(shape[2:]) > 1}
    taps, modules = list[Tap](), list[nn.Module]()
    places = [place for place in last.values() if not isinstance(place[1], nn.Conv2d)]
    for name, module, shape in _chosen(places, only):
        taps.append(Tap(f"{prefix}.{name}".strip("."), shape[1], shape[2], shape[3], pre_activation=False))
        modules.append(module)
    return tuple(taps), [TapPoint() for _ in modules], modules


def _through(point: TapPoint) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        passed: Tensor = point(output)
        return passed

    return hook
