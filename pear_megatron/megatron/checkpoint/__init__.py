"""Checkpoints: saved and resumed, read as models, converted from and exported to Hugging Face."""
