"""`python -m tinygpt`."""

from tinygpt.errors import leave_at_once

leave_at_once()  # before the imports that take long enough to be interrupted

from tinygpt.cli.main import main  # noqa: E402

main()
