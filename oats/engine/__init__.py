"""Whole decoder models in one call of the core a step."""
