"""rkd: distil a teacher you cannot trust into a student you can ship, with numbers measured on the board."""

from __future__ import annotations

__version__ = "0.1.0"
