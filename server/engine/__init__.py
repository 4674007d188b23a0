"""Tokens in, tokens out: scheduling, state slots, sampling. Knows no text and no HTTP."""
