"""OpenAI's HTTP interface, as far as it applies to one text model on one machine."""
