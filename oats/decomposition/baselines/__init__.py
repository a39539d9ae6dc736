"""The pruning methods that OATS is compared with, under the same budget: W ≈ S, without a low-rank part."""
