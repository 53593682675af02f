"""`python -m gruppo` is the command `gruppo`."""

from gruppo.cli import main

main()
