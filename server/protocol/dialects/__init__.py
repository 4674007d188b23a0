"""Wire types of other APIs, which are translated onto our own."""
