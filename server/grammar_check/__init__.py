"""Compiles the grammars of requests in a process of its own, within limits."""
