"""Connects compressed models to other libraries: transformers, PEFT, and images through Pillow."""
