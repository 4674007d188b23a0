"""Drafts of the next tokens from a conversation's own text, and how many are worth verifying."""
