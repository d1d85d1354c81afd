"""
Published algorithms as keywords of VPG: ``VPG("MlpPolicy", env, **presets.REINFORCE)``. To change one of them:
``{**presets.REINFORCE, "n_episodes": 10}``.
"""

from typing import Any

import torch as th

#: Plain gradient ascent, one step per episode, with one environment: Sutton & Barto (2018), section 13.3.
#: ``estimator="total_return"`` is Williams (1992), with the whole return at each step.
REINFORCE: dict[str, Any] = {
    "estimator": "reward_to_go",
    "n_episodes": 1,
    "loss_reduction": "trajectory",
    "discount_state_distribution": True,
    "normalize_advantage": False,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD},
}

#: Sutton & Barto (2018), section 13.4. ``critic_learning_rate`` is the step size of the value function.
REINFORCE_WITH_BASELINE: dict[str, Any] = {**REINFORCE, "baseline": "value", "n_critic_updates": 1}

#: One-step actor-critic with one environment: Sutton & Barto (2018), section 13.5
ACTOR_CRITIC: dict[str, Any] = {
    "estimator": "td_residual",
    "n_steps": 1,
    "discount_state_distribution": True,
    "normalize_advantage": False,
    "n_critic_updates": 1,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD},
}

#: What Spinning Up (2018) calls VPG, with four environments: 4000 steps per update,
#: https://spinningup.openai.com/en/latest/algorithms/vpg.html
SPINNING_UP: dict[str, Any] = {
    "learning_rate": 0.0003,
    "critic_learning_rate": 0.001,
    "n_critic_updates": 80,
    "n_steps": 1000,
    "gamma": 0.99,
    "gae_lambda": 0.97,
    "max_grad_norm": None,
    "policy_kwargs": {"net_arch": [64, 64], "activation_fn": th.nn.Tanh, "ortho_init": False},
}

#: Stable-Baselines3's A2C (Mnih et al., 2016), but for gradient clipping: A2C clips actor and critic together, VPG separately
A2C: dict[str, Any] = {
    "learning_rate": 0.0007,
    "n_steps": 5,
    "gamma": 0.99,
    "gae_lambda": 1.0,
    "normalize_advantage": False,
    "n_critic_updates": 1,
    "policy_kwargs": {
        "optimizer_class": th.optim.RMSprop,
        "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0},
    },
}
