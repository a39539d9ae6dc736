"""A model that answers requests, in the terminal and over HTTP."""
