"""
Ablation studies: compare formulations over environments and seeds.

The same search selects a learning rate for each formulation. Gradient statistics of all formulations are computed on the same
data. See ``python -m sb3_vpg ablation --help`` and docs/ablation.md.
"""
