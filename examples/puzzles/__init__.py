"""The main job on real input: a real chat model answers reasoning-gym puzzles, and its answers are trained on."""
