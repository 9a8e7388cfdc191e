"""What bench_paged.py measures, what takes part, and what is said of it."""
