"""Reads the models and tokenizers that a conversion starts from."""
