"""Other people's clients, unmodified, against a running server; `make test-clients` installs and runs them."""
