"""The command line: parse, call the library, print. No logic, and nothing slow is imported for `--help`."""

from __future__ import annotations

from rkd.cli import bench, demo, distill, doctor, export, inspect, keygen, report, students, targets, teacher, verify
from rkd.cli.app import app


def main() -> None:
    """The `rkd` program."""
    app()


__all__ = [
    "app",
    "bench",
    "demo",
    "distill",
    "doctor",
    "export",
    "inspect",
    "keygen",
    "main",
    "report",
    "students",
    "targets",
    "teacher",
    "verify",
]
