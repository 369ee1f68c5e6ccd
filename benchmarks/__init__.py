"""Measurements of fastbp. Each module is a command; results lie in benchmarks/results/."""
