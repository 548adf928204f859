"""What PEAR's weights will look like on some data, before a GPU-hour is spent.

sample (which trajectories, and the policy's log-probs) -> measure (ratios and weights as training computes
them) -> verdicts and alternatives (what to change) -> page, terminal and JSON (charts, reading).
"""
