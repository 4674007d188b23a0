"""The product as its user has it: `dijiang serve` in its own processes, spoken to over a socket."""
