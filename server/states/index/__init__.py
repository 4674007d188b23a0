"""The index of states: one SQL, in SQLite for one server and in PostgreSQL for several."""
