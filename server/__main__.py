"""`python -m server` is `dijiang`."""

from server.cli import main

main()
