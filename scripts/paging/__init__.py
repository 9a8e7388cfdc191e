"""What scripts/simulate_paging.py is made of. NumPy alone."""
