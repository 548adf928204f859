"""What PEAR's weights will look like on some data, before a GPU-hour is spent.

In the order of reading: settings and sample (which trajectories, and the policy's log-probs), measure (ratios and
weights as training computes them), alternatives and verdicts (what to change), report (all of it, and its JSON),
charts, reading and page (what people look at), run (the command).
"""
