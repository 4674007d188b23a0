"""Whose turn it is: slots, queue places and prompt tokens, shared among tenants and among prompts."""
