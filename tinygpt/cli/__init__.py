"""The command line: `python -m tinygpt COMMAND`."""
