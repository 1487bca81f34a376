"""The run directory: everything about one distillation, and enough to go on with it after any kill (no torch).

    run.json              schema, state, every setting with where it came from, seeds, versions, digests, results
    metrics.jsonl         one line a step group and an epoch
    teacher.safetensors   the teacher as it was converted at intake
    masks.npz             what RobustKD learned
    perturbations.npz     what fools the teacher, which the student is hardened against
    purified.safetensors  the purified teacher, where the method purifies it
    labels.npz            the teacher's answers, where they stand in for labels
    triggers/*.npz        what the student was tested with
    examples/*.npz        a few triggered test images, and what teacher and student say of them
    checkpoints/<step>/   one directory a checkpoint; `digests.json` is written last
    student.safetensors   the result
    report.html

Every write goes through `rkd.files`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rkd import __version__
from rkd.checks import (
    by_name,
    digest,
    flag,
    list_of,
    loss,
    number,
    object_of,
    one_of,
    plain,
    proportion,
    scores_of,
    signed,
    string,
    whole,
)
from rkd.errors import RkdError, RunError, StorageError, first_line, shortened
from rkd.files import (
    append_line,
    file_sha256,
    fill_directory,
    read_bytes,
    read_json,
    remove_temporaries,
    sha256,
    storage_errors,
    to_json,
    write_directory,
    write_file,
)
from rkd.metrics import Proportion, Scores

SCHEMA = 1
DISTIL = "distil"  # how the stage of metrics.jsonl begins that trains the student
SUMMARY, METRICS, STUDENT, TEACHER, MASKS, PERTURBATIONS, PURIFIED, LABELS, EXAMPLES, TRIGGERS, REPORT = (
    "run.json", "metrics.jsonl", "student.safetensors", "teacher.safetensors", "masks.npz", "perturbations.npz",
    "purified.safetensors", "labels.npz", "examples", "triggers", "report.html",
)  # fmt: skip
CLEAN, TRIGGER = "clean.safetensors", "trigger.npz"  # of a teacher's run: its clean twin, and the attacker's trigger
_DIGESTS = "digests.json"
_LOG_LIMIT_BYTES, _DIGESTS_LIMIT_BYTES, _MEMBER_LIMIT_BYTES = 2**26, 2**16, 2**34
_FEWEST_FOOLED = 30  # images, below which their commonest class says nothing
_FOOLS_LITTLE = 20.0  # percent
_KEEP = 2  # checkpoints; the newest may be damaged


_NAMES = list_of(string)
_DATA = object_of({"name": string, "digest": string, "classes": list_of(string, 2), "notes": _NAMES}, others=True)
_MODEL = object_of(
    {
        "role": string, "arch": string, "scores": scores_of(string),
        "parameters": whole(), "macs": whole(), "size_bytes": whole(),
    }
)  # fmt: skip


def _models(value: Any) -> str | None:
    """The teacher's row, the student's, and between them that of a student that trusts it; all under the same triggers."""
    if (problem := list_of(_MODEL, 2)(value)) is not None:
        return problem
    triggers = [[trigger["name"] for trigger in model["scores"]["triggers"]] for model in value]
    return None if all(names == triggers[0] for names in triggers) else ": they are not of the same triggers"


_FIELDS = {
    "schema": whole(),
    "kind": one_of("distill", "teacher"),
    "rkd": string,
    "state": one_of("running", "finished"),
    "created": string,
    "finished": string,
    "command": _NAMES,
    "settings": by_name(object_of({"value": plain, "origin": string})),
    "versions": by_name(string),
    "data": _DATA,
    "teacher": object_of({"sha256": string, "file": string, "arch": string, "notes": _NAMES}, others=True),
    "detox": object_of({"history": list_of(list_of(signed, 4, 4))}, optional=["history"], others=True),
    "fooling": object_of({"fooled": proportion, "towards": string, "together": proportion}, others=True),
    "purified": object_of({"sha256": digest}, others=True),
    "made": by_name(digest),
    "timings": by_name(object_of({"seconds": number}, others=True)),
    "student": object_of({"sha256": string, "arch": string}, others=True),
    "models": _models,
    "out": string,
}  # fmt: skip
_LINE = object_of(
    {"stage": string, "step": whole(), "epoch": whole(), "loss": loss, "ACC": number, "ends_epoch": flag},
    optional={"loss", "ACC", "ends_epoch"},
    others=True,
)  # of metrics.jsonl
_ALWAYS = {"schema", "kind", "state", "settings"}
_FINISHED = {"distill": {"data", "teacher", "student", "models"}, "teacher": {"data"}}


_KNOWN = object_of(_FIELDS, optional=set(_FIELDS) - _ALWAYS, others=True)


def _problem(summary: Any) -> str | None:
    """What of run.json is damaged."""
    if (problem := _KNOWN(summary)) is not None or summary["state"] != "finished":
        return problem
    missing = _FINISHED[summary["kind"]] - set(summary)
    return f": {min(missing)!r} is missing" if missing else None


@dataclass(frozen=True)
class Setting:
    """A setting's value and where it came from: command line, rkd.toml, teacher, data or default."""

    value: Any
    origin: str


class Run:
    """One run directory.

    Attributes:
        path: the directory.
        summary: the content of run.json.
    """

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        self.path, self.summary = path, summary

    @classmethod
    def create(
        cls,
        path: Path,
        kind: str,
        settings: Mapping[str, Setting],
        members: Mapping[str, bytes] | None = None,
        **facts: Any,
    ) -> Run:
        """Make a new run directory, whole or not at all.

        Args:
            path: where.
            kind: `distill` or `teacher`.
            settings: every setting.
            members: files to start with, by name.
            facts: more fields of run.json.

        Raises:
            RunError: `path` exists.
            StorageError: the disk said no.
        """
        check_free(path)
        write = fill_directory if path.exists() else write_directory
        summary = {
            "schema": SCHEMA,
            "kind": kind,
            "rkd": __version__,
            "state": "running",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["rkd", *sys.argv[1:]],
            "settings": {name: {"value": s.value, "origin": s.origin} for name, s in settings.items()},
            "versions": versions(),
            **facts,
        }
        content = {**(members or {}), SUMMARY: to_json(summary)}
        try:
            write(path, content)
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) in (
                errno.ENOTEMPTY,
                errno.EEXIST,
            ):  # another process was quicker
                check_free(path)
            raise
        return cls(path, summary)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run directory.

        Raises:
            RunError: it is not one, or of another schema.
            StorageError: it cannot be read.
        """
        if not (path / SUMMARY).is_file():
            raise RunError(f"{path} is not a run directory: it has no {SUMMARY}")
        try:
            summary = read_json(path / SUMMARY)
        except ValueError as error:
            raise RunError(f"{path / SUMMARY} is damaged: {first_line(error)}") from error
        if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
            seen = summary.get("schema") if isinstance(summary, dict) else None
            raise RunError(f"{path / SUMMARY} has schema {shortened(repr(seen), 80)}, this rkd reads {SCHEMA}")
        if (problem := _problem(summary)) is not None:
            raise RunError(f"{path / SUMMARY} is damaged: run.json{problem}")
        return cls(path, summary)

    @classmethod
    def newest(cls, root: Path) -> Run:
        """The newest finished distillation under `root`.

        Raises:
            RunError: there is none.
        """
        runs = list[Run]()
        unfinished = list[Run]()
        for candidate in sorted(root.glob(f"*/{SUMMARY}")):
            try:
                run = cls.open(candidate.parent)
            except RunError:
                continue
            if run.summary.get("kind") == "distill":
                (runs if run.finished else unfinished).append(run)
        if not runs:
            hint = (
                f"; {unfinished[-1].path} is unfinished, go on with: rkd distill --resume {unfinished[-1].path}"
                if unfinished
                else ""
            )
            raise RunError(f"no finished run under {root}{os.sep}: name one, or make one with rkd distill{hint}")
        return max(runs, key=lambda run: (str(run.summary.get("finished", "")), run.path.stat().st_mtime_ns))

    @property
    def finished(self) -> bool:
        """Whether its student is there."""
        return bool(self.summary["state"] == "finished")

    def setting(self, name: str) -> Any:
        """The value of a setting.

        Raises:
            RunError: the run has no such setting.
        """
        try:
            return self.summary["settings"][name]["value"]
        except (KeyError, TypeError):
            made_by = self.summary.get("rkd")
            raise RunError(
                f"{self.path / SUMMARY} lacks the setting {name!r}: it was made by another rkd ({made_by}, here {__version__}), "
                "or is damaged; make the run again"
            ) from None

    def save(self, **changes: Any) -> None:
        """Change fields of run.json and write it.

        Raises:
            StorageError: the disk said no.
        """
        self.summary |= changes
        write_file(self.path / SUMMARY, to_json(self.summary))

    def keep(self, name: str, data: bytes, **changes: Any) -> None:
        """Write a file that a resumed run goes on with; before it is there, run.json has its digest and the changes.

        Raises:
            StorageError: the disk said no.
        """
        path = self.path / name
        with storage_errors(path):
            path.unlink(missing_ok=True)  # one whose digest is not known
        self.save(**changes, made={**self.summary.get("made", {}), name: sha256(data)})
        write_file(path, data)

    def kept(self, name: str, limit_bytes: int = 2**30) -> bytes | None:
        """What `keep` wrote; None where it is not there, or its digest is not known: then it is made again.

        Raises:
            RunError: it has changed since.
            StorageError: it cannot be read, or is no regular file.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        with storage_errors(path):
            data = read_bytes(path, limit_bytes)
        recorded = self.summary.get("made", {}).get(name)
        if recorded not in (None, sha256(data)):
            raise RunError(f"{path} has changed since the run made it; restore it, or start a new run")
        return None if recorded is None else data

    def finish(self, **changes: Any) -> None:
        """Write run.json for the last time; the run is done."""
        self.save(**changes, state="finished", finished=self._after_all_others())
        self.drop_checkpoints()

    def _after_all_others(self) -> str:
        """The time now, or a moment after the latest run beside this one, where the clock was set back since."""
        stamps = [datetime.now(timezone.utc)]
        for summary in self.path.resolve().parent.glob(f"*/{SUMMARY}"):
            try:
                finished = datetime.fromisoformat(Run.open(summary.parent).summary["finished"])
                stamps.append(finished.astimezone(timezone.utc) + timedelta(microseconds=1))
            except (RkdError, KeyError, TypeError, ValueError, OverflowError):
                continue
        return max(stamps).isoformat(timespec="microseconds")

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints: what they led to is written. What rkd did not put beside them stays, as does their folder.

        Raises:
            RunError: their folder is a link.
        """
        root = self._checkpoint_root()
        for place in self._checkpoints():
            if _is_checkpoint(place):
                _remove_checkpoint(place)
        with suppress(OSError):
            remove_temporaries(root)
            root.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of this run.

        Raises:
            RunError: another process is working in it, or its checkpoints are behind a link.
        """
        self._checkpoint_root()
        with storage_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is working in this run; wait for it or stop it") from None
            remove_temporaries(self.path)
            remove_temporaries(self.path / EXAMPLES)
            yield
        finally:
            os.close(descriptor)

    def log(self, **line: Any) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            StorageError: the disk said no.
        """
        append_line(self.path / METRICS, json.dumps(line, allow_nan=False))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut short is left out.

        Raises:
            RunError: a line is not one that `log` writes.
            StorageError: it cannot be read.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        with storage_errors(path):
            written = read_bytes(path, _LOG_LIMIT_BYTES).decode(errors="replace").split("\n")[:-1]
        lines = []
        for place, line in enumerate(written, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(f"{path} is damaged: line {place}: {first_line(error)}") from error
            if (problem := _LINE(value)) is not None:
                raise RunError(f"{path} is damaged: line {place}{problem}")
            lines.append(value)
        return lines

    def cut_metrics(self, stage: str, step: int) -> None:
        """Forget what was logged of `stage` after `step`: it will be logged again."""
        kept = [line for line in self.metrics() if line["stage"] != stage or line["step"] <= step]
        write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def save_checkpoint(self, step: int, members: Mapping[str, bytes]) -> None:
        """Write `checkpoints/<step>/` whole, its digests last, and remove older ones.

        Raises:
            RunError: something that rkd did not make has its name, or the checkpoints' folder is a link.
            StorageError: the disk said no; earlier checkpoints are untouched.
        """
        root = self._checkpoint_root()
        place = root / f"{step:08}"
        with storage_errors(root):
            root.mkdir(exist_ok=True)
            remove_temporaries(root)
            if os.path.lexists(place):
                if not _is_checkpoint(place, members):
                    raise RunError(f"{place} is no checkpoint of rkd's, and the next one takes its name; move it away")
                _remove_checkpoint(place)  # a damaged one of the same step
        digests = to_json({name: sha256(data) for name, data in members.items()})
        write_directory(place, {**members, _DIGESTS: digests})
        older = [old for old in self._checkpoints() if int(old.name) < step and _is_checkpoint(old)]
        for old in older[_KEEP - 1 :]:
            _remove_checkpoint(old)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that verifies, of which no more than a part is held."""
        return next((int(place.name) for place in self._checkpoints() if _verified(place)), None)

    def checkpoints(self) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Step and members of every checkpoint that verifies, the newest first.

        Raises:
            RunError: their folder is a link.
        """
        for place in self._checkpoints():
            if names := _verified(place):
                try:
                    members = {name: read_bytes(place / name, _MEMBER_LIMIT_BYTES) for name in names}
                except OSError:
                    continue
                yield int(place.name), members

    def _checkpoints(self) -> list[Path]:
        """Folders that are named as checkpoints are, newest first; half-written ones have another name.

        Raises:
            RunError: the checkpoints' folder is a link.
        """
        named = [p for p in self._checkpoint_root().glob("*") if re.fullmatch(r"[0-9]{8}|[1-9][0-9]{8,}", p.name)]
        found = [p for p in named if p.is_dir() and not p.is_symlink()]
        return sorted(found, key=lambda place: int(place.name), reverse=True)

    def _checkpoint_root(self) -> Path:
        """The folder of the checkpoints, which need not be there.

        Raises:
            RunError: it is a link: what is removed there would be another folder's.
        """
        root = self.path / "checkpoints"
        if root.is_symlink():
            raise RunError(f"{root} is a link, expected a folder of the run's own; put the folder itself in its place")
        return root


def _is_checkpoint(place: Path, members: Collection[str] = ()) -> bool:
    """Whether rkd made a folder: its digests are there, or nothing but such members, as damage or a kill leave it."""
    if place.is_symlink() or not place.is_dir():
        return False
    names = {entry.name for entry in place.iterdir()}
    return _DIGESTS in names or names <= set(members)


def _remove_checkpoint(place: Path) -> None:
    """Remove its digests last: what a kill leaves of it is known as a checkpoint, or empty."""
    with suppress(OSError):
        for entry in place.iterdir():
            if entry.name == _DIGESTS:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def _verified(place: Path) -> list[str]:
    """The names of a checkpoint's members; none where one is not as its digest says."""
    try:
        digests = json.loads(read_bytes(place / _DIGESTS, _DIGESTS_LIMIT_BYTES))
        if not isinstance(digests, dict) or any("/" in name for name in digests):
            return []
        same = all(file_sha256(place / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, RecursionError):
        return []
    return list(digests) if same else []


def check_free(path: Path) -> None:
    """See that a new run may be made there: nothing is, or an empty folder.

    Raises:
        RunError: something is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        unfinished = (path / SUMMARY).is_file() and not (path / STUDENT).is_file()
        go_on = f", or go on with it by --resume {path}" if unfinished else ""
        raise RunError(f"{path} exists; choose another --out{go_on}")


def free_name(root: Path, name: str) -> Path:
    """`root/name`, or `root/name-2`, ... where that exists."""
    path, number = root / name, 1
    while path.exists():
        number += 1
        path = root / f"{name}-{number}"
    return path


def versions() -> dict[str, str]:
    """Python's and the relevant packages' versions."""
    found = {"python": sys.version.split()[0], "rkd": __version__}
    for package in ("torch", "torchvision", "numpy", "safetensors", "onnx", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Model:
    """A row of the table: one network with what was measured of it."""

    role: str
    arch: str
    scores: Scores
    parameters: int
    macs: int
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As it goes into run.json."""
        return {
            "role": self.role, "arch": self.arch, "scores": self.scores.to_json(),
            "parameters": self.parameters, "macs": self.macs, "size_bytes": self.size_bytes,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Model:
        """Inverse of `to_json`."""
        return cls(
            str(value["role"]), str(value["arch"]), Scores.from_json(value["scores"]),
            int(value["parameters"]), int(value["macs"]), int(value["size_bytes"]),
        )  # fmt: skip


def fooling_text(found: dict[str, Any], radius: float) -> str:
    """A sentence of what `Fooling.to_json` gave."""
    fooled, together = (Proportion.from_json(found[name]) for name in ("fooled", "together"))
    text = (
        f"changes of at most {radius:g}/255, the same for all images, make the teacher see {_share(fooled)} training "
        "images wrongly that it sees rightly without"
    )
    if not fooled.n:
        return "the teacher sees no training image rightly, so nothing can fool it"
    if fooled.hits >= _FEWEST_FOOLED:
        text += f", {_share(together)} of these as {found['towards']}"
    if fooled.value < _FOOLS_LITTLE:
        text += " (little, which does not clear it: a patch, for one, is not looked for)"
    return text


def _share(found: Proportion) -> str:
    low, high = found.interval
    return f"{found.value:.1f} % [{low:.1f}, {high:.1f}] of {found.n}"


def models_of(run: Run) -> list[Model]:
    """The rows of a finished run: the teacher's first, the student's last.

    Raises:
        RunError: it is not finished.
    """
    if not run.finished:
        raise RunError(f"{run.path} is not finished; go on with: rkd distill --resume {run.path}")
    return [Model.from_json(row) for row in run.summary["models"]]
