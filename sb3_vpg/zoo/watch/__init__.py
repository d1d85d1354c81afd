"""``python -m sb3_vpg watch``: show an agent's environment beside what the agent computes at each step."""
