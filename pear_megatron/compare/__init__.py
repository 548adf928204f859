"""pear-megatron compare: arms x seeds of an offline phase, the same GRPO after it, and what came of both.

Read in this order: recipe (what to compare), cell (one arm on one seed, in full), stages (what a cell does),
workers (how it is run), run (which cells, in which order), checks (that arms differ in nothing else),
outcome (numbers), figures and page (what people see).
"""
