"""The tools that people already use: transformers and its checkpoints."""
