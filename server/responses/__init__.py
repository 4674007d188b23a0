"""The life of a response of the Responses API: planned, run, stored, suspended, told again."""
