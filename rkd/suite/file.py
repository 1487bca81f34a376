"""The suite file: what it may say, read and checked. See docs/suite.md for the form.

name = "mine"                  # by default the file's own
seeds = [0]
[teacher]                      # options of `rkd teacher` for all teachers
[distill]                      # options of `rkd distill` for all students
[data.NAME]  [pairs.NAME]  [attacks.NAME]  [budgets.NAME]  [defences.NAME]
[[override]]  [[exclude]]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError, shortened
from rkd.suite.recipes import Kind, checked_options, distill_kind, teacher_kind
from rkd.toml import read_toml, unknown_key

CLEAN = "clean"  # the attack entry of cells whose teacher is the clean twin
FULL = "full"  # the budget entry of a suite without [budgets]

AXES = ("data", "pair", "attack", "budget", "defence")
_TABLES = {"data": "data", "pair": "pairs", "attack": "attacks", "budget": "budgets", "defence": "defences"}
_KEYS: dict[str, tuple[str, ...]] = {
    "data": ("data", "teacher", "distill"),
    "pair": ("teacher", "distill"),
    "attack": ("teacher",),
    "budget": ("distill",),
    "defence": ("distill", "undefended"),
}
_MISPLACED = {
    (
        "attack",
        "distill",
    ): "a defence does not know the attack: give distill options to a defence, pair, budget or data set",
    ("budget", "teacher"): "a teacher does not know the defender's budget",
    ("defence", "teacher"): "a teacher does not know the defence",
}
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9+.%-]|_(?!_)){0,59}")
_MOST_SEEDS = 100


@dataclass(frozen=True)
class Entry:
    """One name on one axis.

    Attributes:
        name: as the file gives it.
        teacher, distill: its options.
        seeds: of its cells; None to leave them.
        only: per axis, the names that it goes with; an axis that is not there goes with all.
        source: for a data set: what `--data` takes.
        undefended: for a defence: its student trusts the teacher, so its excess says whether a case transfers.
    """

    name: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: str = ""
    undefended: bool = False


@dataclass(frozen=True)
class Rule:
    """An `[[override]]` or `[[exclude]]`: which cells, and what changes for them."""

    match: Mapping[str, frozenset[str]]
    teacher: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None

    def covers(self, names: Mapping[str, str]) -> bool:
        """Whether a cell with these names is meant."""
        return all(names.get(axis) in chosen for axis, chosen in self.match.items())


@dataclass(frozen=True)
class Suite:
    """A checked suite file.

    Attributes:
        name: of the suite; folders go by it.
        about: what it is for, in the file's own words.
        seeds: of cells for which nothing else says.
        teacher, distill: options for all.
        axes: the entries of each axis.
        overrides, excludes: rules, in order.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    teacher: Mapping[str, Any]
    distill: Mapping[str, Any]
    axes: Mapping[str, tuple[Entry, ...]]
    overrides: tuple[Rule, ...]
    excludes: tuple[Rule, ...]


def read_suite(path: Path) -> Suite:
    """Read and check a suite file.

    Raises:
        ConfigError: it is not TOML, or says something that no suite can say; the message names the place.
        StorageError: it cannot be read.
    """
    return _Reader(path, teacher_kind(), distill_kind()).suite(read_toml(path))


@dataclass(frozen=True)
class _Reader:
    path: Path
    teachers: Kind
    students: Kind

    def suite(self, content: Mapping[str, Any]) -> Suite:
        known = ("name", "about", "seeds", "teacher", "distill", *_TABLES.values(), "override", "exclude")
        content = self._keys(content, known, "")
        name = content.get("name", self.path.stem)
        self._name(name, "the suite", "name")
        about = content.get("about", "")
        if not isinstance(about, str):
            raise ConfigError(f"{self.path}: about = {about!r}: expected a text")
        axes = {axis: self._axis(axis, content.get(table, {})) for axis, table in _TABLES.items()}
        if not axes["budget"]:
            axes["budget"] = (Entry(FULL),)
        for axis in ("data", "pair", "defence"):
            if not axes[axis]:
                raise ConfigError(f"{self.path}: no [{_TABLES[axis]}.NAME]; a suite needs at least one")
        if not axes["attack"]:
            axes["attack"] = (Entry(CLEAN),)
        axes = {
            axis: tuple(self._with_only(entry, content.get(_TABLES[axis], {}), axis, axes) for entry in entries)
            for axis, entries in axes.items()
        }
        return Suite(
            name,
            " ".join(about.split()),
            self._seeds(content.get("seeds", [0]), "seeds"),
            self._options(self.teachers, content.get("teacher", {}), "[teacher]"),
            self._options(self.students, content.get("distill", {}), "[distill]"),
            axes,
            self._rules(content.get("override", []), "override", axes),
            self._rules(content.get("exclude", []), "exclude", axes),
        )

    def _axis(self, axis: str, table: Any) -> tuple[Entry, ...]:
        title = _TABLES[axis]
        if not isinstance(table, Mapping) or not all(isinstance(value, Mapping) for value in table.values()):
            raise ConfigError(f"{self.path}: [{title}] holds tables only: write [{title}.NAME]")
        seen: dict[str, str] = {}
        for name in table:
            self._name(name, f"[{title}.{name}]", "name")
            if (twin := seen.setdefault(name.lower(), name)) != name:
                raise ConfigError(
                    f"{self.path}: [{title}.{twin}] and [{title}.{name}] differ in case only: two cells would have one name"
                )
        return tuple(self._entry(axis, name, value) for name, value in table.items())

    def _entry(self, axis: str, name: str, table: Mapping[str, Any]) -> Entry:
        where = f"[{_TABLES[axis]}.{name}]"
        for (kind, key), why in _MISPLACED.items():
            if kind == axis and key in table:
                raise ConfigError(f"{self.path}: {where}: {key}: {why}")
        table = self._keys(table, (*_KEYS[axis], "seeds", "only", "about"), where)
        source = table.get("data", name)
        undefended = table.get("undefended", False)
        if not isinstance(source, str) or not isinstance(undefended, bool):
            raise ConfigError(f"{self.path}: {where}: data must be a text, undefended must be true or false")
        teacher = self._options(self.teachers, table.get("teacher", {}), f"{where} teacher")
        if axis == "attack":
            self._clean_is_clean(name, teacher, where)
        return Entry(
            name,
            teacher,
            self._options(self.students, table.get("distill", {}), f"{where} distill"),
            self._seeds(table["seeds"], f"{where} seeds") if "seeds" in table else None,
            source=source if axis == "data" else "",
            undefended=undefended,
        )

    def _clean_is_clean(self, name: str, teacher: Mapping[str, Any], where: str) -> None:
        none = self.teachers.default("attack")
        if name == CLEAN and teacher:
            raise ConfigError(f"{self.path}: {where} is the clean twin and takes no options; give them in [teacher]")
        if name != CLEAN and teacher.get("attack", none) == none:
            raise ConfigError(
                f"{self.path}: {where} names no attack; write teacher = {{ attack = ... }}, or call it [attacks.{CLEAN}]"
            )

    def _with_only(
        self, entry: Entry, table: Mapping[str, Any], axis: str, axes: Mapping[str, tuple[Entry, ...]]
    ) -> Entry:
        only = table.get(entry.name, {}).get("only", {})
        where = f"[{_TABLES[axis]}.{entry.name}] only"
        if not isinstance(only, Mapping):
            raise ConfigError(f"{self.path}: {where}: expected a table such as {{ defence = ['a', 'b'] }}")
        others = [other for other in AXES if other != axis]
        self._keys(only, others, where)
        chosen = {other: self._chosen(names, other, axes, where) for other, names in only.items()}
        return Entry(**{**vars(entry), "only": chosen})

    def _rules(self, tables: Any, title: str, axes: Mapping[str, tuple[Entry, ...]]) -> tuple[Rule, ...]:
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            raise ConfigError(f"{self.path}: write [[{title}]] with two brackets: there may be several")
        rules = []
        for number, given in enumerate(tables, 1):
            where = f"[[{title}]] number {number}"
            changes = ("teacher", "distill", "seeds") if title == "override" else ()
            table = self._keys(given, (*AXES, *changes, "about"), where)
            match = {axis: self._chosen(table[axis], axis, axes, where) for axis in AXES if axis in table}
            if not match or (changes and not any(key in table for key in changes)):
                raise ConfigError(
                    f"{self.path}: {where} {'matches everything' if not match else 'changes nothing'}; "
                    f"give {' or '.join(AXES if not match else changes)}"
                )
            if "distill" in table and "attack" in match:
                raise ConfigError(f"{self.path}: {where}: {_MISPLACED['attack', 'distill']}")
            if "teacher" in table and ("defence" in match or "budget" in match):
                raise ConfigError(f"{self.path}: {where}: a teacher does not know the defence or the budget")
            rules.append(
                Rule(
                    match,
                    self._options(self.teachers, table.get("teacher", {}), f"{where} teacher"),
                    self._options(self.students, table.get("distill", {}), f"{where} distill"),
                    self._seeds(table["seeds"], f"{where} seeds") if "seeds" in table else None,
                )
            )
        return tuple(rules)

    def _chosen(self, value: Any, axis: str, axes: Mapping[str, tuple[Entry, ...]], where: str) -> frozenset[str]:
        """The entries that a name, a pattern or a list of them stands for."""
        patterns = value if isinstance(value, list) else [value]
        names = [entry.name for entry in axes[axis]]
        chosen: set[str] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ConfigError(f"{self.path}: {where}: {axis} = {pattern!r}: expected a name or a list of names")
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found and not (axis == "attack" and pattern == CLEAN):
                hint = unknown_key(pattern, names).replace("unknown key", f"there is no {axis}")
                raise ConfigError(f"{self.path}: {where}: {hint}")
            chosen.update(found or [pattern])
        return frozenset(chosen)

    def _options(self, kind: Kind, options: Any, where: str) -> dict[str, Any]:
        where = f"{self.path}: {where}"
        if not isinstance(options, Mapping):
            raise ConfigError(f"{where}: expected a table of options of rkd {kind.command}")
        return checked_options(kind, options, where)

    def _seeds(self, value: Any, where: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or not all(type(v) is int and 0 <= v < 2**31 for v in value):
            raise ConfigError(
                f"{self.path}: {where} = {shortened(repr(value), 200)}: expected a list of whole numbers such as [0, 1, 2]"
            )
        if len(value) > _MOST_SEEDS:
            raise ConfigError(f"{self.path}: {where}: {len(value)} seeds, expected at most {_MOST_SEEDS}")
        if len(set(value)) < len(value):
            raise ConfigError(
                f"{self.path}: {where} = {shortened(repr(value), 200)}: a seed is there twice: two cells would have one name"
            )
        return tuple(value)

    def _keys(self, table: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
        names = list(known)
        found: dict[str, Any] = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in names:
                hint = unknown_key(key, [n.replace("_", "-") for n in names])
                raise ConfigError(f"{self.path}: {where}{': ' if where else ''}{hint}{_elsewhere(self, key)}")
            found[name] = value
        return found

    def _name(self, name: Any, what: str, key: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{self.path}: {what} has the {key} {shortened(repr(name), 100)}: folders go by it, use up to 60 letters, digits, '-', '+', "
                "'.', '%' and single '_'"
            )


def _elsewhere(reader: _Reader, key: str) -> str:
    """Where a misplaced option belongs."""
    name = key.replace("-", "_")
    homes = [kind.command for kind in (reader.teachers, reader.students) if name in kind.known()]
    return f" ({key} is an option of rkd {homes[0]}: put it into {homes[0]} = {{ ... }})" if homes else ""
