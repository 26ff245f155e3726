"""`python -m loglinear`."""

from loglinear.cli import main

main()
