"""`python -m tinygpt`."""

from tinygpt.cli.main import main

main()
