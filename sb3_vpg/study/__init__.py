"""
Which trick buys what? Formulations x environments x seeds, with the learning rate of each formulation chosen by the same
search, and the variance of their gradients on the same data. ``python -m sb3_vpg ablation --help``; docs/ablation.md.
"""
