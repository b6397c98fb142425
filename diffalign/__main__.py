"""`python -m diffalign` is the `diffalign` command."""

from .commands.cli import main

main()
