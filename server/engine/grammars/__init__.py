"""Grammars over token ids, and the requests that wait for one."""
