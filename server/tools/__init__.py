"""Tool calls: how a template asks for them, how they are found in text, grammars that force them."""
