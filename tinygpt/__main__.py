"""`python -m tinygpt`."""

from tinygpt.cli import main

main()
