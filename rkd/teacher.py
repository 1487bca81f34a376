"""Open a stranger's checkpoint without running it.

A checkpoint is never executed: `torch.load(weights_only=True)` without a fallback, or safetensors. What comes out is
tensors with names. Which network they belong to, how many classes it has and how its inputs are scaled is inferred
where that is possible and asked for where it is not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch._C import PyTorchFileReader

from rkd.data import Source
from rkd.errors import ArchitectureError, CheckpointError, ConfigError, first_line
from rkd.files import open_regular, sha256, storage_errors, write_file
from rkd.metrics import Images, Labels, Proportion
from rkd.models import build
from rkd.models.infer import infer_arch, output_count
from rkd.models.keys import known_names
from rkd.network import LARGEST_BYTES, NORMALISATIONS, Network, Normalisation, safe_arch, safetensors_header
from rkd.pickles import UnsafeGlobalError, check_pickle
from rkd.zips import check_end, open_zip

_LARGE_BYTES = 2**28  # from here on the first bytes must be right before the others are read
_MAX_TENSORS = 100_000
_INDEX_BYTES = 16 * 2**20  # of a zip archive, for so many tensors
_MAX_HEADER_VALUES = 100_000  # of rkd's own header, which names every class
_LEGACY_PICKLES = 5  # magic number, version, system, content, names of storages
_NUMBER_KINDS = ("f2", "f4", "f8", "i4", "i8", "u1", "b1")
_BATCH = 64  # images at once: teachers for large images take gigabytes
_MAX_SHARING = 4  # tensors may share memory, but together claim at most so many times the file
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "teacher", "weights", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")


def _number_type(kind: object, *_flags: object) -> np.dtype[Any]:
    """`numpy.dtype` for plain numbers: of its other types, a single value of a pickle of 60 bytes can take gigabytes."""
    if kind not in _NUMBER_KINDS:
        raise ValueError(f"a numpy value of type {str(kind)[:40]!r}")
    return np.dtype(str(kind))


# Training scripts keep their best accuracy as a numpy number; making one runs no code.
_NUMBER = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    _NUMBER, (_NUMBER, "numpy.core.multiarray.scalar"), (_NUMBER, "numpy._core.multiarray.scalar"), (_number_type, "numpy.dtype"),
    *{type(np.dtype(kind)) for kind in _NUMBER_KINDS},
]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Tensors from a file, and what the file says of them.

    Attributes:
        tensors: float32, without wrappers and prefixes.
        header: what rkd wrote beside them, if rkd wrote the file.
        sha256: of the file.
        path: of the file.
        notes: what was unwrapped or converted, for people.
    """

    tensors: dict[str, Tensor]
    header: Mapping[str, Any] | None
    sha256: str
    path: Path
    notes: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, without BN's counters."""
        return {n: tuple(t.shape) for n, t in self.tensors.items() if not n.endswith("num_batches_tracked")}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read `.safetensors`, or a state dict saved by torch under any name, bare or wrapped.

    Raises:
        CheckpointError: not a checkpoint, a pickle that wants to run code, TorchScript, NaN weights, absurd sizes.
        StorageError: it cannot be read.
    """
    with storage_errors(path):
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; expected a checkpoint file (.pt, .pth, .tar or .safetensors)")
        data = _read_whole(path)
    return parse_checkpoint(data, path)


def parse_checkpoint(data: bytes, path: Path) -> Checkpoint:
    """Read a checkpoint's bytes; `path` names it in errors, and its ending says whether it is safetensors.

    Raises:
        CheckpointError: as for `read_checkpoint`.
    """
    if not data:
        raise CheckpointError(f"{path} is empty; download it again")
    header: Mapping[str, Any] | None
    if path.suffix == ".safetensors":
        found: object = _load_safetensors(data, path)
        header = safetensors_header(data, path)
    else:
        found = _load_pickle(data, path)
        rkd_header = found.get("rkd") if isinstance(found, dict) else None
        header = _plain(rkd_header, path) if isinstance(rkd_header, dict) else None
    notes: list[str] = []
    state = _strip_prefixes(_unwrap(found, path, notes), notes)
    return Checkpoint(_sound(state, len(data), path, notes), header, sha256(data), path, tuple(notes))


def open_teacher(
    checkpoint: Checkpoint,
    *,
    arch: str | None,
    normalisation: Normalisation | None,
    classes: tuple[str, ...] | None,
    size: tuple[int, int],
) -> list[Network]:
    """Make the network that a checkpoint belongs to.

    Args:
        checkpoint: from `read_checkpoint`.
        arch: the user's `--arch`; None to take it from the header or infer it.
        normalisation: the user's `--normalize`; None to take it from the header.
        classes: the data's class names; None where there is no data.
        size: height and width of the data's images.

    Returns:
        Every network that fits, the likeliest first; they differ in strides only. `choose_teacher` picks one by data.

    Raises:
        ArchitectureError: no network or another network fits, or the number of classes differs.
        ConfigError: the input scaling is not known.
    """
    header, path = checkpoint.header, checkpoint.path
    names = (arch,) if arch else _arch_of(checkpoint, size)
    outputs = output_count(checkpoint.shapes) or (len(classes) if classes else 0)
    named = _classes_of(header)
    if named is not None and not arch:
        outputs = len(named)
    if classes is not None and outputs != len(classes):
        raise ArchitectureError(
            f"{path} has {outputs} classes, the data has {len(classes)} ({', '.join(classes[:3])}, ...); "
            "give the data that the teacher was trained on"
        )
    scaling = scaling_of(checkpoint, normalisation)
    labels = named or classes or tuple(str(i) for i in range(outputs))
    provenance = header.get("provenance") if header is not None else None
    networks = []
    for name in names:
        if name != arch:  # a stranger's file named it: see that it fits before memory is taken for it
            with torch.device("meta"):
                _check_fit(build(name, outputs, size), checkpoint, name)
        module = build(name, outputs, size)
        module.load_state_dict(_check_fit(module, checkpoint, name), strict=False)
        network = Network(
            module.eval(), name, labels, size, scaling, provenance if isinstance(provenance, dict) else {}
        )
        network.check_runs()
        networks.append(network)
    return networks


def scaling_of(checkpoint: Checkpoint, given: Normalisation | None) -> Normalisation:
    """How the teacher's inputs were scaled: as the user says, or else as the file does.

    Raises:
        ConfigError: nobody says.
    """
    scaling = given or _normalisation_of(checkpoint.header)
    if scaling is None:
        raise ConfigError(
            f"{checkpoint.path} does not say how its inputs were scaled; give --normalize none (pixels in [0, 1]), "
            "imagenet, cifar10 or 'MEAN;STD' such as '0.5;0.5'"
        )
    return scaling


def choose_teacher(
    candidates: list[Network], clean: Source, device: torch.device, *, limit: int = 512, seed: int = 0
) -> tuple[Network, Proportion]:
    """The candidate that is best on clean training images, and its accuracy on them.

    Args:
        candidates: from `open_teacher`.
        clean: clean images, never the test set.
        device: where to compute.
        limit: images to look at.
        seed: which images.

    Raises:
        CheckpointError: none of them is better than chance; the message says what seems to be wrong.
    """
    images, labels = _some_of(clean, limit, seed)
    scored = [(*_accuracy(network, images, labels, device), network) for network in candidates]
    found, predicted, best = max(scored, key=lambda item: item[0].hits)
    # How often answers with these frequencies would be right if they did not look at the image.
    share_said, share_true = (np.bincount(x, minlength=len(best.classes)) / len(labels) for x in (predicted, labels))
    chance = 100 * float(share_said @ share_true)
    if found.interval[0] > chance:
        return best, found
    raise CheckpointError(
        f"the teacher gets {found.value:.1f} % of {found.n} clean images right, chance is {chance:.1f} %: "
        + _hint(best, predicted, labels, chance, lambda network: _accuracy(network, images, labels, device)[0])
    )


def likelier_scaling(
    teacher: Network, clean: Source, device: torch.device, *, limit: int = 256, seed: int = 0
) -> str | None:
    """What to ask about a `--normalize` that was given by hand, where another one suits the teacher clearly better.

    Args:
        teacher: as it was chosen.
        clean: clean images, never the test set.
        device: where to compute.
        limit: images to look at.
        seed: which images.

    Returns:
        A line with both accuracies; None where no usual scaling is better by more than both intervals.

    Raises:
        CheckpointError: under another scaling the teacher is right more than twice as often.
    """
    images, labels = _some_of(clean, limit, seed)
    given, _ = _accuracy(teacher, images, labels, device)
    name, best = _best_scaling(teacher, lambda network: _accuracy(network, images, labels, device)[0])
    if best.interval[0] <= given.interval[1]:
        return None
    seen = (
        f"--normalize {teacher.normalisation}: {given.value:.1f} % of {given.n} clean training images are right, with "
        f"--normalize {name} {best.value:.1f} %"
    )
    if best.hits > 2 * given.hits:
        raise CheckpointError(f"{seen}, so its inputs were probably scaled that way; give --normalize {name}")
    return f"{seen}; is {name} how the teacher's inputs were scaled?"


def _some_of(clean: Source, limit: int, seed: int) -> tuple[Images, Labels]:
    return clean.batch(np.sort(np.random.default_rng([seed, 0x7EAC]).permutation(len(clean))[:limit]))


def _accuracy(network: Network, images: Images, labels: Labels, device: torch.device) -> tuple[Proportion, Labels]:
    """How often a network is right, and what it says."""
    predict = network.predictor(device)
    predicted = np.concatenate([predict(images[i : i + _BATCH]).argmax(1) for i in range(0, len(images), _BATCH)])
    return Proportion(int((predicted == labels).sum()), len(labels)), predicted


def _best_scaling(network: Network, accuracy: Callable[[Network], Proportion]) -> tuple[str, Proportion]:
    """The best of the usual scalings that are not the network's own, as it is typed, and the accuracy under it."""
    usual = {**NORMALISATIONS, "'0.5;0.5'": Normalisation((0.5,) * 3, (0.5,) * 3)}
    others = {n: accuracy(replace(network, normalisation=v)) for n, v in usual.items() if v != network.normalisation}
    return max(others.items(), key=lambda item: item[1].hits)


def save_teacher(path: Path, network: Network) -> None:
    """Write a teacher: `.safetensors` by that ending, otherwise a state dict that `torch.load(weights_only=True)` reads.

    Raises:
        StorageError: the disk said no.
    """
    if path.suffix == ".safetensors":
        network.save(path)
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.module.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "rkd": network.describe()}, buffer)
    write_file(path, buffer.getvalue())


def _read_whole(path: Path) -> bytes:
    """A file that may be a checkpoint; a large one that begins otherwise is not read to its end."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > LARGEST_BYTES:
            raise CheckpointError(f"{path}: {size_bytes:,} bytes; teachers have at most {LARGEST_BYTES:,}")
        head = file.read(9)
        header_bytes = int.from_bytes(head[:8], "little")
        known = head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or (head[8:] == b"{" and header_bytes < size_bytes)
        if size_bytes > _LARGE_BYTES and not known:
            raise CheckpointError(
                f"{path} does not begin as a checkpoint does; expected .pt, .pth, .tar or .safetensors"
            )
        return head + file.read()


def _load_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_safetensors(data))
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def _plain(header: dict[Any, Any], path: Path) -> dict[str, Any]:
    """What rkd wrote beside the tensors: JSON, whoever wrote it."""
    pending: list[object] = [header]
    for _ in range(
        _MAX_HEADER_VALUES
    ):  # lists of lists of lists, each there once, can stand for more than fits anywhere
        if not pending:
            break
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    if pending:
        raise CheckpointError(f"{path}: its rkd header has more than {_MAX_HEADER_VALUES:,} values; refused")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its rkd header is not plain data: {first_line(error)}") from error
    return plain


def _load_pickle(data: bytes, path: Path) -> object:
    try:
        for file in _pickles(data, path):
            check_pickle(file, len(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_NUMPY_NUMBERS):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except UnsafeGlobalError as error:
        raise CheckpointError(
            f"{path} wants to run {error.name} while loading and was refused; nothing was run. "
            "Get the weights as .safetensors, or ask its author for the bare state_dict"
        ) from error
    except (pickle.UnpicklingError, ValueError) as error:
        if data[:1] != b"\x80" and data[:2] != b"PK":
            raise CheckpointError(
                f"{path} is not a checkpoint: it does not begin as one; expected a state dict saved by torch, or .safetensors"
            ) from error
        reason = re.search(r"WeightsUnpickler error: (.{1,200})", str(error))
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely: {reason[1].strip() if reason else first_line(error)}; "
            "ask its author for the bare state_dict or .safetensors"
        ) from error
    except Exception as error:  # torch leaks RuntimeError, EOFError, AttributeError and more
        raise CheckpointError(
            f"{path} is not a checkpoint{_reason(error)}; expected a state dict saved by torch, or .safetensors"
        ) from error


def _pickles(data: bytes, path: Path) -> Iterator[io.BytesIO]:
    """Where torch will read pickles, one after the other."""
    if data[:2] == b"PK":
        _check_archive(data, path)
        yield io.BytesIO(PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl"))
        return
    file = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        yield file


def _reason(error: Exception) -> str:
    """`: what went wrong`; nothing for a KeyError, which is a byte that is no pickle's."""
    return "" if isinstance(error, KeyError) else f": {first_line(error)}"


def _check_archive(data: bytes, path: Path) -> None:
    if path.suffix == ".rkd":
        raise CheckpointError(
            f"{path} is a bundle for boards (rkd bench {path} measures it); expected a checkpoint, .pt or .safetensors"
        )
    if path.suffix == ".npz":
        raise CheckpointError(
            f"{path} holds arrays, expected a checkpoint; a trigger goes to --trigger, images to --data"
        )
    try:
        with open_zip(io.BytesIO(data), _INDEX_BYTES) as archive:
            entries = archive.infolist()
        check_end(data)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or was cut short ({first_line(error)}); download it again") from error
    if any(entry.filename.endswith("constants.pkl") or "/code/" in f"/{entry.filename}" for entry in entries):
        raise CheckpointError(
            f"{path} is a TorchScript archive: it holds code, which rkd does not run; "
            "load it where you trust it and save its state_dict()"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed inside, which torch never writes; refused")
    if sum(entry.file_size for entry in entries) > len(data):
        raise CheckpointError(f"{path} announces more content than it holds: it is damaged or was cut short")
    if sum(entry.filename.endswith("data.pkl") for entry in entries) != 1:
        raise CheckpointError(f"{path} is a zip archive without a torch checkpoint in it, or with several")


def _unwrap(found: object, path: Path, notes: list[str]) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(found, dict) or not found:
            kind = "an empty dictionary" if isinstance(found, dict) else f"a {type(found).__name__}"
            raise CheckpointError(f"{path} holds {kind}, expected a state dict (tensor names and tensors)")
        if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
            return dict(found)
        inner = next((key for key in _WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            keys = ", ".join(repr(key)[:40] for key in list(found)[:8])
            raise CheckpointError(
                f"{path} holds {keys}; none of these is a state dict (looked for {', '.join(_WRAPPERS)}); "
                "save the state dict alone"
            )
        notes.append(f"the tensors were inside {inner!r}")
        found = found[inner]
    raise CheckpointError(f"{path} wraps its state dict more than twice; save the state dict alone")


def _strip_prefixes(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                notes.append(f"removed prefix {prefix!r}")
                changed = True
    return state


def _sound(state: dict[str, Tensor], file_bytes: int, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Float32 tensors that are really there, finite and not larger than the file."""
    if len(state) > _MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(state):,} tensors, at most {_MAX_TENSORS:,} are allowed")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > _MAX_SHARING * file_bytes:
        name = max(state, key=lambda name: state[name].numel())
        raise CheckpointError(
            f"{path}: its tensors claim many times the bytes that the file has, {name!r} most; refused"
        )
    sound, bad, kinds = {}, list[str](), set[str]()
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{path}: tensor {name!r} is sparse, quantised or on no device; expected plain weights"
            )
        if tensor.numel() * tensor.element_size() > file_bytes:
            raise CheckpointError(f"{path}: tensor {name!r} claims more bytes than the file has; refused")
        if not tensor.is_floating_point():
            if tensor.is_complex():
                raise CheckpointError(f"{path}: tensor {name!r} holds {tensor.dtype}, expected real weights")
            sound[name] = tensor.detach().contiguous()  # counters and tables of indices
            continue
        if tensor.dtype != torch.float32:
            kinds.add(str(tensor.dtype).removeprefix("torch."))
        sound[name] = tensor.detach().float().contiguous()
        if not bool(torch.isfinite(sound[name]).all()):
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {', '.join(bad[:3])}{more}; the teacher is broken, get another copy"
        )
    if kinds:
        notes.append(f"converted from {', '.join(sorted(kinds))} to float32")
    return sound


def _arch_of(checkpoint: Checkpoint, size: tuple[int, int]) -> tuple[str, ...]:
    if checkpoint.header is not None and "arch" in checkpoint.header:
        return (safe_arch(checkpoint.header["arch"], str(checkpoint.path)),)
    names = infer_arch(checkpoint.shapes, size)
    if not names:
        first = ", ".join(list(checkpoint.tensors)[:4])
        raise ArchitectureError(
            f"{checkpoint.path}: these tensors fit no network that rkd knows ({first}, ...); name it with --arch "
            "(a torchvision name, timm:NAME, or path/file.py:factory for your own code)"
        )
    return names


def _classes_of(header: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    classes = header.get("classes") if header is not None else None
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        return None
    return tuple(classes)


def _normalisation_of(header: Mapping[str, Any] | None) -> Normalisation | None:
    if header is None or "mean" not in header or "std" not in header:
        return None
    try:
        mean, std = (tuple(float(value) for value in header[key]) for key in ("mean", "std"))
        return Normalisation(mean, std)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's normalisation is not three means and deviations: {error}") from error


def _check_fit(module: nn.Module, checkpoint: Checkpoint, arch: str) -> dict[str, Tensor]:
    """The checkpoint's tensors by the network's names, which other people's ports may call differently.

    Raises:
        ArchitectureError: they are another network's.
    """
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}
    tensors, got = checkpoint.tensors, checkpoint.shapes
    if set(got) != set(wanted) and set(renamed := known_names(got)) == set(wanted):
        tensors, got = known_names(tensors), renamed
    problems = [f"{n} is {got[n]}, expected {wanted[n]}" for n in wanted if n in got and got[n] != wanted[n]]
    problems += [f"{n} is missing" for n in wanted if n not in got]
    fractions = {n: t.is_floating_point() for n, t in module.state_dict().items()}
    problems += [
        f"{n} holds {t.dtype}, expected {'fractions' if fractions[n] else 'whole numbers'}"
        for n, t in tensors.items()
        if n in fractions and fractions[n] != t.is_floating_point()
    ]
    problems += [f"{n} is not part of it" for n in got if n not in wanted]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ArchitectureError(
            f"{checkpoint.path} is not a {arch}: {'; '.join(problems[:3])}{more}; give another --arch"
        )
    return tensors


def _hint(
    network: Network,
    predicted: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    chance: float,
    accuracy: Callable[[Network], Proportion],
) -> str:
    """What seems to be wrong with a teacher that is no better than chance."""
    name, best = _best_scaling(network, accuracy)
    majority = {int(c): int(np.bincount(labels[predicted == c]).argmax()) for c in np.unique(predicted)}
    permuted = 100 * float(np.mean([majority[int(p)] == int(y) for p, y in zip(predicted, labels, strict=True)]))
    if len(majority) > 1 and permuted > max(50, best.value):
        return f"its answers are consistent ({permuted:.0f} % under another class order), so the class folders are probably in another order than its outputs"
    if best.interval[0] > chance:
        return f"with --normalize {name} it gets {best.value:.1f} %, so its inputs were probably scaled that way"
    return "check --normalize, the class order (folders are sorted by name) and that this is the teacher's data"
