"""The default store of states: one folder with an SQLite index, for one server."""
