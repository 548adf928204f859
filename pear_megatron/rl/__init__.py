"""The RL phase after PEAR: checked starts of NeMo-RL from our checkpoints, and PEAR's loss for NeMo-RL itself."""
