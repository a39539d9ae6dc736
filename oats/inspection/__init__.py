"""What a compressed model looks like inside: its report, and what each part attends to."""
