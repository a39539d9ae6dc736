"""What a compressed model looks like inside: its HTML report, and what each part attends to."""
