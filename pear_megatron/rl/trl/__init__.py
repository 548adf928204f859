"""GRPO on one machine, by TRL."""
