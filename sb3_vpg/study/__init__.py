"""
Studies: compare algorithms, and settings of VPG, over environments and seeds.

``python -m sb3_vpg compare`` runs or resumes one and writes its report. See docs/compare.md.
"""
