"""Golden files against every backend."""
