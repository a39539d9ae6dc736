"""How fast layers and whole models are."""
