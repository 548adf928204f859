"""NeMo-RL: checked starts from our checkpoints, and the PEAR loss inside its own trainer."""
