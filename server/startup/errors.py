"""What keeps the server from starting."""


class StartError(Exception):
    """The server cannot start; the text is a sentence for the operator."""
