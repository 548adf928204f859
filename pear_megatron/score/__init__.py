"""Behaviour log-probs for offline trajectories: computed by a model, or read from what the generator recorded.

backends (load_scorer) score trajectories; rows and recorded make them from the input; chunks, manifest and run
turn files into one Parquet file that training takes, and continue where a killed run stopped.
"""
