"""
How noisy is the gradient of one update, under each formulation, at one and the same
policy?

256 episodes are played by a policy early in its training and dealt out into batches of
16. For each formulation: the variance of the gradient from batch to batch, as a share
of reward-to-go's; its signal-to-noise ratio; and the mean cosine of a batch's gradient
with the unbiased direction, that of "value" on all other data. The TD residual has by
far the least noise; where it points is what the critic says, and so early the critic is
wrong.
"""

from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.diagnostics import UpdateSpec, gradient_statistics
from sb3_vpg.envs.native_vec_env import NativeVecEnv
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

whole = statistics["reward_to_go"].variance.value
print(f"{'':13}  variance     SNR  cosine")
for name, one in statistics.items():
    share, cosine = one.variance.value / whole, one.cosine_with_reference.value
    print(f"{name:13}  {share:8.3f}  {one.snr.value:6.2f}  {cosine:6.2f}")
