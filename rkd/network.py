"""A network together with what is needed to use it: architecture, class names, image size, input normalisation.

The only format that rkd keeps is safetensors, with these in its header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rkd.errors import ArchitectureError, CheckpointError, ConfigError
from rkd.files import read_bytes, storage_errors, write_file
from rkd.metrics import Images, Predict
from rkd.models import build

LARGEST_BYTES = 16 * 2**30  # of a file of weights
_HEADER_KEY = "rkd"
_MAX_DEPTH = 202  # of a wide ResNet that a file names; making one of 9,994 takes a minute


@dataclass(frozen=True)
class Normalisation:
    """Input scaling: `(pixel / 255 - mean) / std` for each RGB channel."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not all(np.isfinite([*self.mean, *self.std])):
            raise ConfigError(
                f"normalisation needs three finite means and three deviations, got {self.mean}; {self.std}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"normalisation deviations must be positive, got {self.std}")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 of the same shape and memory format."""
        scale = [1 / (255 * s) for s in self.std]
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        view = (1, 3, 1, 1)
        scales = torch.tensor(scale, device=images.device).view(view)
        shifts = torch.tensor(shift, device=images.device).view(view)
        return torch.addcmul(shifts, images.float(), scales)

    @classmethod
    def parse(cls, text: str) -> Normalisation:
        """`none`, `imagenet`, `cifar10` or `MEAN;STD`, e.g. `0.5,0.5,0.5;0.25,0.25,0.25` or `0.5;0.25`.

        Raises:
            ConfigError: it is none of these.
        """
        if text in NORMALISATIONS:
            return NORMALISATIONS[text]
        try:
            mean, std = ([float(value) for value in part.split(",")] for part in text.split(";"))
            (r, g, b), (s, t, u) = (part * 3 if len(part) == 1 else part for part in (mean, std))
        except ValueError:
            raise ConfigError(
                f"--normalize {text!r}: expected none, imagenet, cifar10, or MEAN;STD such as '0.5;0.5' or '0.49,0.48,0.45;0.25,0.24,0.26'"
            ) from None
        return cls((r, g, b), (s, t, u))

    def __str__(self) -> str:
        for name, known in NORMALISATIONS.items():
            if known == self:
                return name
        parts = [part[:1] if len(set(part)) == 1 else part for part in (self.mean, self.std)]
        return ";".join(",".join(f"{value:g}" for value in part) for part in parts)


NORMALISATIONS = {
    "none": Normalisation(),
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass
class Network:
    """A teacher or a student.

    Attributes:
        module: images (N, 3, H, W), normalised, to logits (N, classes).
        arch: a name that `rkd.models.build` understands.
        classes: their names in the order of the outputs.
        size: height and width of its images in pixels.
        normalisation: what its inputs are scaled by.
        provenance: how it came to be (attack, seed, data, digests), for people; rkd takes a
            data set's name from it (`data_spec`), and nothing else.
    """

    module: nn.Module
    arch: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    normalisation: Normalisation
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def describe(self) -> dict[str, Any]:
        """What the header of its file holds."""
        return {
            "arch": self.arch,
            "classes": list(self.classes),
            "size": list(self.size),
            "mean": list(self.normalisation.mean),
            "std": list(self.normalisation.std),
            "provenance": dict(self.provenance),
        }

    def to_bytes(self) -> bytes:
        """The network as safetensors; equal networks give equal bytes."""
        tensors = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.module.state_dict().items()
        }
        return bytes(save_safetensors(tensors, {_HEADER_KEY: json.dumps(self.describe(), sort_keys=True)}))

    def save(self, path: Path) -> None:
        """Write safetensors.

        Raises:
            StorageError: the disk said no.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path, trusted: str = "") -> Network:
        """Read what `save` wrote.

        Args:
            path: the file.
            trusted: code that the user named on the command line (`path/file.py:factory`); the file may name it too.

        Raises:
            CheckpointError: not a network that rkd wrote.
            StorageError: it cannot be read.
        """
        with storage_errors(path):
            data = read_bytes(path, LARGEST_BYTES)
        try:
            tensors = load_safetensors(data)
        except Exception as error:  # safetensors raises its own errors
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        header = safetensors_header(data, path)
        if header is None:
            raise CheckpointError(f"{path} was not written by rkd; give it as a teacher instead")
        try:
            with torch.device("meta"):  # see that it fits before memory is taken for it
                wanted = cls.from_header(header, trusted).module.state_dict()
            if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in tensors.items()}:
                raise ValueError(f"its tensors are not those of {header['arch']}")
            network = cls.from_header(header, trusted)
            network.module.load_state_dict(tensors)
        except CheckpointError:
            raise
        except Exception as error:  # whatever an odd header makes of a network
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return network

    @classmethod
    def from_header(cls, header: Mapping[str, Any], trusted: str = "") -> Network:
        """A network with fresh weights from `describe()`'s answer; `trusted` as in `load`."""
        classes, size = tuple(map(str, header["classes"])), (int(header["size"][0]), int(header["size"][1]))
        arch = trusted if trusted and header["arch"] == trusted else safe_arch(header["arch"], "the file")
        module = build(arch, len(classes), size)
        normalisation = Normalisation(tuple(header["mean"]), tuple(header["std"]))
        return cls(module, str(header["arch"]), classes, size, normalisation, dict(header.get("provenance", {})))

    def check_runs(self) -> None:
        """One forward pass on a blank image.

        Raises:
            ArchitectureError: it fails, or gives another number of classes.
        """
        training = self.module.training
        device = next(self.module.parameters()).device
        try:
            with torch.no_grad():
                logits = self.module.eval()(torch.zeros(1, 3, *self.size, device=device))
        except Exception as error:
            height, width = self.size
            raise ArchitectureError(f"{self.arch} does not run on {height}x{width} images: {error}") from error
        finally:
            self.module.train(training)
        if not isinstance(logits, Tensor) or logits.shape != (1, len(self.classes)):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ArchitectureError(f"{self.arch} returned {shape}, expected logits of shape (1, {len(self.classes)})")

    def predictor(self, device: torch.device) -> Predict:
        """A function from uint8 images (N, 3, H, W) to float32 logits (N, classes), in eval mode, in FP32."""
        module = self.module.to(device).eval()

        def predict(images: Images) -> NDArray[np.float32]:
            with torch.inference_mode():
                batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
                batch = self.normalisation(batch.contiguous(memory_format=torch.channels_last))
                logits: NDArray[np.float32] = module(batch).float().cpu().numpy()
            return logits

        return predict


def safe_arch(name: object, origin: str) -> str:
    """A network's name as a file gives it; a file may not name code to run.

    Raises:
        CheckpointError: it is not a plain name; `origin` says whose.
    """
    if not isinstance(name, str) or not re.fullmatch(
        r"((torchvision|timm):)?[A-Za-z0-9_-]{1,100}(\.[a-z0-9_]+)?", name
    ):
        raise CheckpointError(
            f"{origin} names the network {str(name)[:100]!r}; a file may only give a plain name: use --arch"
        )
    if (deep := re.fullmatch(r"wrn-(\d+)-\d+", name)) and int(deep[1]) > _MAX_DEPTH:
        raise CheckpointError(
            f"{origin} names {name}, which takes too long to make; if you want it, give it with --arch"
        )
    if ".py" in name:
        raise CheckpointError(f"{origin} names code to run ({name}); if you trust that code, give it with --arch")
    return name


def check_code(arch: str, allowed: str, option: str, origin: Path) -> None:
    """Refuse a network that a directory makes by code, unless the user named that code on the command line.

    Args:
        arch: the network's name.
        allowed: what the user gave.
        option: by which option.
        origin: the directory.

    Raises:
        ConfigError: the user did not name it.
    """
    if ".py" in arch and arch != allowed:
        raise ConfigError(f"{origin} is made by code ({arch}); if you trust it, add --{option} {arch}")


def safetensors_header(data: bytes, path: Path) -> dict[str, Any] | None:
    """The description that rkd wrote into a safetensors file; None where a stranger wrote the file.

    Args:
        data: the file, which safetensors has read already.
        path: names it in errors.

    Raises:
        CheckpointError: not a safetensors file.
    """
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        header = json.loads(metadata[_HEADER_KEY]) if _HEADER_KEY in metadata else None
    except Exception as error:  # ValueError, RecursionError, AttributeError and TypeError for odd JSON
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return header if isinstance(header, dict) else None
