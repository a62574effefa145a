"""`vit-engine verify --full`: every check that a machine can run, each in a process of its own, and one report."""
