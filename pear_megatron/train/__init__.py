"""Training: the loop, its start and resumption, what a run writes; ``python -m pear_megatron.train``."""
