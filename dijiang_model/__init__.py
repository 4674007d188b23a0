"""DiJiang models: what they compute, how they are stored, and how one is made. Knows no HTTP."""
