"""Readers and scorers of the papers' benchmarks, in their published formats."""
