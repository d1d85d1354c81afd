"""
Published algorithms as keywords of VPG: ``VPG("MlpPolicy", env, **presets.REINFORCE)``.

To change a keyword: ``VPG("MlpPolicy", env, **{**presets.REINFORCE, "n_episodes": 10})``.
"""

from typing import Any

import torch as th

#: REINFORCE, Sutton & Barto (2018), section 13.3: one step of plain gradient ascent per episode. Use it with one environment.
#: With ``estimator="total_return"`` and ``gamma=1`` it is the algorithm of Williams (1992): the return weights each step.
REINFORCE: dict[str, Any] = {
    "estimator": "reward_to_go",
    "n_episodes": 1,
    "loss_reduction": "trajectory",
    "discount_state_distribution": True,
    "normalize_advantage": False,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD},
}

#: REINFORCE with baseline, Sutton & Barto (2018), section 13.4. Set ``critic_learning_rate`` for the step size of the critic.
#: The critic's step is a mean over the steps of the episode, where the book has the sum.
REINFORCE_WITH_BASELINE: dict[str, Any] = {**REINFORCE, "baseline": "value", "n_critic_updates": 1}

#: One-step actor-critic, Sutton & Barto (2018), section 13.5. Use it with one environment.
ACTOR_CRITIC: dict[str, Any] = {
    "estimator": "td_residual",
    "n_steps": 1,
    "discount_state_distribution": True,
    "normalize_advantage": False,
    "n_critic_updates": 1,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD},
}

#: VPG of Spinning Up (2018), https://spinningup.openai.com/en/latest/algorithms/vpg.html. Use it with four environments, which
#: gives its 4000 steps per update. It continues episodes, fits the values to the lambda-return, and has SB3's epsilon of Adam,
#: where Spinning Up resets the environments before each update, fits the values to the reward-to-go, and has PyTorch's.
SPINNING_UP: dict[str, Any] = {
    "learning_rate": 0.0003,
    "critic_learning_rate": 0.001,
    "n_critic_updates": 80,
    "n_steps": 1000,
    "gamma": 0.99,
    "gae_lambda": 0.97,
    "max_grad_norm": None,
    "policy_kwargs": {"net_arch": [64, 64], "activation_fn": th.nn.Tanh, "ortho_init": False, "log_std_init": -0.5},
}

#: A2C (Mnih et al., 2016) as in Stable-Baselines3, with one difference: A2C clips the gradients of actor and critic together,
#: VPG clips them separately.
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
