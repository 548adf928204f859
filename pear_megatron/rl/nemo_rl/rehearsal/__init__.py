"""The program that rehearses NeMo-RL's start; it runs in NeMo-RL's environment and is imported by nobody."""
