"""
Train with five formulations of the policy gradient and print how the return of the
training episodes grows: the mean of the last 100 episodes, four times. All other
settings are equal.

The total return learns little. Leaving out past rewards (reward-to-go) helps most. A
baseline, whether a plain mean or a critic, can help further. Each formulation has one
seed, so that the script takes only seconds. The order of the other four is chance.
"""

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import safe_mean

from sb3_vpg import VPG
from sb3_vpg.envs import NativeVecEnv

FORMULATIONS = {
    "total_return": {"estimator": "total_return"},
    "reward_to_go": {"estimator": "reward_to_go"},
    "reward_to_go - time": {"estimator": "reward_to_go", "baseline": "time"},
    "reward_to_go - value": {"estimator": "reward_to_go", "baseline": "value"},
    "gae": {"estimator": "gae", "gae_lambda": 0.99},
}
COMMON = {
    "n_episodes": 1,  # one whole episode of each of the 16 environments per update
    "normalize_advantage": False,
    "gamma": 0.99,
    "learning_rate": 0.01,
    "n_critic_updates": 5,
}
STEPS = 15_000

print(f"{'steps':20}", *(f"{k * STEPS:8,}" for k in range(1, 5)))
for name, formulation in FORMULATIONS.items():
    env = make_vec_env("CartPole-v1", n_envs=16, seed=0, vec_env_cls=NativeVecEnv)
    model = VPG("MlpPolicy", env, seed=0, device="cpu", **COMMON, **formulation)
    returns = []
    for k in range(1, 5):
        model.learn(k * STEPS - model.num_timesteps, reset_num_timesteps=False)
        returns.append(safe_mean([episode["r"] for episode in model.ep_info_buffer]))
    print(f"{name:20}", *(f"{value:8.1f}" for value in returns))
