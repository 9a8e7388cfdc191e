"""What scripts/bench_attention.py is made of."""
