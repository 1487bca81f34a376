"""What `rkd distill TEACHER` can find out for itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rkd.data import is_name
from rkd.errors import ConfigError
from rkd.progress import say
from rkd.teacher import read_checkpoint


def find_data(teacher: Path, data: str) -> tuple[str, str | None]:
    """The data set and, where it was not given, who named it. A teacher can only give a name, never a place.

    Raises:
        ConfigError: nobody names one.
        CheckpointError: the teacher cannot be read.
    """
    if data:
        return data, None
    header = read_checkpoint(teacher).header or {}
    provenance = header.get("provenance")
    spec = provenance.get("data_spec") if isinstance(provenance, dict) else None
    if isinstance(spec, str) and is_name(spec):
        return spec, "teacher"
    raise ConfigError(
        f"which data? neither {teacher} nor rkd.toml names a data set: give --data FOLDER, an .npz or a name"
    )


def find_triggers(teacher: Path, triggers: Sequence[Path]) -> tuple[tuple[str, ...], str | None]:
    """The triggers to test with: those given, or the one beside the teacher, and then that it was found there."""
    beside = trigger_beside(teacher)
    if not triggers and beside.is_file():
        return (str(beside),), "teacher"
    if beside.is_file() and beside not in triggers:
        say(f"not tested with {beside}: only the given triggers are; add --trigger {beside} to test with it too")
    return tuple(str(path) for path in triggers), None


def trigger_beside(teacher: Path) -> Path:
    """Where `rkd teacher` puts the trigger of a teacher."""
    return teacher.with_name(f"{teacher.stem}.trigger.npz")


def clean_twin_beside(teacher: Path) -> Path:
    """Where `rkd teacher` puts the clean twin of a backdoored teacher."""
    return teacher.with_name(f"{teacher.stem}.clean{teacher.suffix}")
