"""pass@k of a Hugging Face checkpoint with intervals, and two checkpoints compared on the same problems.

settings -> sampling (engines, samples) -> samples.jsonl -> results -> paired; statistics and figures are files
of their own.
"""
