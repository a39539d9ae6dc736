"""``W ≈ S + U V`` for one matrix. Nothing here knows of a model."""
