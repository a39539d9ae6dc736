"""A model that answers one request after another, in the terminal and over HTTP."""
