"""The trained agents of the checkout."""

import re

from helpers.installed import CHECKOUT

AGENTS = CHECKOUT / "rl-trained-agents"
#: Steps to be played and the least mean return of the episodes in them
AT_LEAST = {
    "CartPole-v1": (2500, 500),
    "CartPoleSwingUp-v0": (2500, 350),
    "CartPoleSwingUp-v1": (2500, 400),
    "Acrobot-v1": (2000, -100),
    "Pendulum-v1": (6000, -220),
    "MountainCar-v0": (3000, -130),
    "LunarLander-v3": (4000, 240),
    "Hopper-v5": (4000, 2000),
    "HalfCheetah-v5": (3000, 3000),
    "BipedalWalker-v3": (4000, 250),
}
#: Packages that an environment needs
NEEDED = {"LunarLander-v3": ["Box2D"], "BipedalWalker-v3": ["Box2D"], "Hopper-v5": ["mujoco"], "HalfCheetah-v5": ["mujoco"]}


def mean_return(output: str) -> float:
    (mean,) = re.findall(r"Mean reward: (\S+) \+/-", output)
    return float(mean)
