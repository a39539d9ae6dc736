"""The walk over a model: statistics, decomposition, replacement, block by block."""
