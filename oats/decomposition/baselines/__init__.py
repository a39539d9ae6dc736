"""Pruning methods to compare OATS with: ``W ≈ S``, no low-rank part, the same budget."""
