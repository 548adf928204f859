"""PEAR inside other people's training loops: a file per stack, thin, over ``offline_data`` and the forward step."""
