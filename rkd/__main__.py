"""`python -m rkd`."""

from rkd.cli import main

main()
