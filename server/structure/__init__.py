"""Structured output: from what a request asks for to a grammar that the engine may be given."""
