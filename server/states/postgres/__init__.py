"""A store of states that several servers share: PostgreSQL, and working copies of its files."""
