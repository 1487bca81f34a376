"""What a network costs and how well it does, on the workstation."""

from __future__ import annotations

import os

import torch
from torch.utils.flop_counter import FlopCounterMode

from rkd.errors import ConfigError, RuntimeUnavailableError
from rkd.network import Network


def count_macs(network: Network) -> int:
    """Multiply-accumulate operations of one image's forward pass, as torch's own counter sees them."""
    module = network.module.eval()
    device = next(module.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(torch.zeros(1, 3, *network.size, device=device))
    return int(counter.get_total_flops()) // 2


def named_device(name: str) -> torch.device | None:
    """`cpu`, `cuda` or `cuda:N`, which may not be there; None for `auto`.

    Raises:
        ConfigError: another name.
    """
    if name == "auto":
        return None
    if name != "cpu" and name.partition(":")[0] != "cuda":
        raise ConfigError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N") from error


def choose_device(name: str) -> torch.device:
    """The device of that name (see `named_device`), which must be there; for `auto` CUDA where it is there.

    Raises:
        ConfigError: another name.
        RuntimeUnavailableError: CUDA was asked for and is not there.
    """
    device = named_device(name)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RuntimeUnavailableError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device computes in it (AMX, AVX512-BF16, Ampere or newer), else fp32 (fp16 on older GPUs)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"  # noqa: SLF001  (torch has no public name for it)


def use_threads(threads: int) -> None:
    """Set the number of CPU threads; 0 means what OMP_NUM_THREADS says, or else all that the process may use.

    One thread makes runs repeat byte for byte.

    Subnormal numbers are flushed to zero: they are noise here, and computing with them is many times slower.
    """
    cores, wanted = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    default = min(int(wanted), cores) if wanted.isdecimal() and len(wanted) < 10 and int(wanted) else cores
    torch.set_num_threads(threads or default)
    torch.set_flush_denormal(True)
