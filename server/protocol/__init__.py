"""Bytes on the wire: pydantic types of requests and answers, strict, one docstring per field."""
