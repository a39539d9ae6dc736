"""How good a model is: perplexity, tasks, and methods compared."""
