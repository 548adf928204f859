"""Hugging Face checkpoints in and out of Megatron-Core, streamed tensor by tensor."""
