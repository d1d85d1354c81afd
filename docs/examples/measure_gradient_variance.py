"""
How noisy is the gradient of one update with each formulation? All formulations are
measured on the same policy.

A policy that is early in its training plays 256 episodes, which are split into batches
of 16. The script prints for each formulation:

- the variance of the batch gradients, as a ratio to that of reward-to-go,
- their signal-to-noise ratio,
- the mean cosine between the gradient of a batch and the unbiased direction, which is
  the gradient of "value" on all other data.

The TD residual has by far the least noise. Its direction depends on the critic, which
is wrong so early in training.
"""

from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.diagnostics import UpdateSpec, gradient_statistics
from sb3_vpg.envs import NativeVecEnv
from sb3_vpg.estimators import Formulation

FORMULATIONS = {
    "total_return": Formulation("total_return"),
    "reward_to_go": Formulation("reward_to_go"),
    "mean": Formulation("reward_to_go", "mean"),
    "time": Formulation("reward_to_go", "time"),
    "leave_one_out": Formulation("reward_to_go", "leave_one_out"),
    "value": Formulation("reward_to_go", "value"),
    "gae": Formulation("gae", gae_lambda=0.95),
    "td_residual": Formulation("td_residual"),
}

env = make_vec_env("CartPole-v1", n_envs=16, seed=2, vec_env_cls=NativeVecEnv)
model = VPG("MlpPolicy", env, n_steps=32, gamma=0.99, seed=2, device="cpu").learn(20_000)
statistics = gradient_statistics(
    model,
    env,
    {name: UpdateSpec(formulation) for name, formulation in FORMULATIONS.items()},
    n_episodes=256,
    reference="value",
    seed=2,
)

scale = statistics["reward_to_go"].variance.value
print(f"{'':13}  variance     SNR  cosine")
for name, one in statistics.items():
    share, cosine = one.variance.value / scale, one.cosine_with_reference.value
    print(f"{name:13}  {share:8.3f}  {one.snr.value:6.2f}  {cosine:6.2f}")
