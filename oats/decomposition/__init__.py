"""``W ≈ S + U V`` for one matrix. Nothing in this folder knows about models."""
