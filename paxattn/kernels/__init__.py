"""One kernel a file. They import jax, `tiles` and each other's arithmetic, nothing else of paxattn."""
