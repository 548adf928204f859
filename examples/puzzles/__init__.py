"""The main job on real input: a real chat model, real puzzles, and every command from text to a better model."""
