"""`python -m rkd`, and what the installed `rkd` calls."""

from __future__ import annotations

import sys


def main() -> None:
    """The `rkd` program; Ctrl-C before a command runs, as while Python still imports, leaves with 130 in silence."""
    try:
        from rkd.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
