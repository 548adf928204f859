"""Megatron-Core: models, layouts, optimizer, schedule, checkpoints. All that touches its API is here, but for a few
lines of score/megatron_scorer.py; hf/bridge.py imports Megatron-Bridge."""
