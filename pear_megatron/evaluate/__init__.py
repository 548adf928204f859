"""pass@k of a Hugging Face checkpoint with intervals, and two checkpoints compared on the same problems.

settings -> sampler (engines, samples) -> samples.jsonl -> results -> compare; statistics and figures are files
of their own.
"""
