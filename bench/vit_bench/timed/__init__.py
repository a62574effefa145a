"""Benchmarks: one table of shapes, timed against baselines where there is hardware, compiled where there is none."""
