"""Measuring a model: perplexity on a text, and latency."""
