"""Other libraries: transformers, PEFT, and vision models."""
