"""How long layers and whole models take."""
