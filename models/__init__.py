"""Decoders and their weights. They know no store and no kernel: a layer calls kv.attend."""
