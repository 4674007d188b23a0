"""Thin routes: validate, tokenize, admit, answer. Every user error is raised before the 200."""
