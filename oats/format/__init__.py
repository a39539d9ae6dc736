"""Bits on disk: what the tensors of one layer are, and what makes them valid (docs/format.md)."""
