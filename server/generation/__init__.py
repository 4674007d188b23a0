"""One request from its validated fields to the text of its answers; shared by every endpoint."""
