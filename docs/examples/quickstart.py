"""
Train an agent that balances a pole, evaluate it, save it and load it again.

The script prints the mean return of 10 episodes before and after training. The maximum
is 500. The loaded model plays exactly as the saved one.
"""

import tempfile
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_vpg import VPG


def mean_return(model: VPG) -> float:
    env = make_vec_env("CartPole-v1", seed=0)
    return evaluate_policy(model, env, n_eval_episodes=10)[0]


env = make_vec_env("CartPole-v1", n_envs=8, seed=2)
model = VPG("MlpPolicy", env, n_steps=32, gamma=0.99, seed=2, device="cpu")
print(f"before training: {mean_return(model):.1f}")

model.learn(50_000)
print(f"after {model.num_timesteps} steps: {mean_return(model):.1f}")

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "cartpole")
    loaded = VPG.load(Path(folder) / "cartpole")
print(f"loaded again: {mean_return(loaded):.1f}")
