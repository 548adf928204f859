"""Everything that touches Megatron-Core's own API; nothing outside this folder imports ``megatron``."""
