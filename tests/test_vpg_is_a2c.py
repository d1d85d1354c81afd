"""
With GAE at lambda 1, no normalisation, one critic pass, no clipping and the same optimizer, VPG is A2C: SB3's implementation
is the oracle for rollouts, advantages, losses and updates as a whole.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.models import OwnForward
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_vpg import VPG

N_UPDATES = 20
# A2C sums over the batch in random order. RMSprop divides by sqrt(v) + eps: an eps well above the rounding of the gradients
# keeps it from blowing up the difference, where a gradient is next to nothing.
SMALL = {"net_arch": [16], "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-3}}


class RandomWalk(gym.Env):
    """Noisy observations, a reward that depends on the action, terminations, and a time limit after 7 steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def _obs(self):
        def draw(space):
            if isinstance(space, spaces.Dict):
                return {key: draw(part) for key, part in space.spaces.items()}
            if space.dtype == np.uint8:
                return self.np_random.integers(0, 256, space.shape, dtype=np.uint8)
            return self.np_random.normal(size=space.shape).astype(np.float32)

        return draw(self.observation_space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        reward = float(np.sum(action)) + self.np_random.normal()
        return self._obs(), reward, self.np_random.random() < 0.1, self.t >= 7, {}


VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
FORCE = spaces.Box(-1, 1, (2,), np.float32)
CASES = {
    "discrete": ("MlpPolicy", VECTOR, spaces.Discrete(3), {}),
    "box": ("MlpPolicy", VECTOR, FORCE, {}),
    "separate extractors": ("MlpPolicy", VECTOR, FORCE, {"policy_kwargs": {**SMALL, "share_features_extractor": False}}),
    "entropy bonus": ("MlpPolicy", VECTOR, FORCE, {"ent_coef": 0.1, "vf_coef": 0.3}),
    "multi-discrete": ("MlpPolicy", VECTOR, spaces.MultiDiscrete([2, 3]), {}),
    "multi-binary": ("MlpPolicy", VECTOR, spaces.MultiBinary(3), {}),
    "dict": ("MultiInputPolicy", spaces.Dict({"a": VECTOR, "b": FORCE}), FORCE, {}),
    "gSDE": ("MlpPolicy", VECTOR, FORCE, {"use_sde": True, "sde_sample_freq": 3}),
    # Without an analytical form of the entropy
    "squashed gSDE": (
        "MlpPolicy",
        VECTOR,
        FORCE,
        {"use_sde": True, "ent_coef": 0.1, "policy_kwargs": {**SMALL, "squash_output": True}},
    ),
    "CNN": (
        "CnnPolicy",
        IMAGE,
        spaces.Discrete(2),
        {"policy_kwargs": {**SMALL, "features_extractor_kwargs": {"features_dim": 16}}},
    ),
    "normalize_advantage": ("MlpPolicy", VECTOR, FORCE, {"normalize_advantage": True}),
}


def train(algorithm, policy, observation_space, action_space, wrap=lambda env: env, callback=None, **kwargs):
    env = wrap(make_vec_env(lambda: RandomWalk(observation_space, action_space), n_envs=2, seed=1))
    n_steps = kwargs.pop("n_steps", 8)
    model = algorithm(
        policy,
        env,
        **{"policy_kwargs": SMALL, "normalize_advantage": False, **kwargs},
        **({"n_critic_updates": 1} if algorithm is VPG else {}),
        n_steps=n_steps,
        gamma=0.99,
        gae_lambda=1.0,
        max_grad_norm=np.inf,
        learning_rate=1e-3,
        seed=3,
        device="cpu",
    )
    return model.learn(N_UPDATES * n_steps * 2, callback, log_interval=None)


def assert_same_weights(vpg, a2c):
    expected = a2c.policy.state_dict()
    for name, weight in vpg.policy.state_dict().items():
        np.testing.assert_allclose(weight, expected[name], atol=1e-5, err_msg=name)
    assert vpg._n_updates == a2c._n_updates == N_UPDATES


def assert_same_logs(vpg, a2c):
    """Of the last update."""
    names = {name for name in a2c.logger.name_to_value if name.startswith("train/")}
    assert {"train/policy_loss", "train/entropy_loss", "train/value_loss", "train/explained_variance"} <= names
    for name in names:
        logged, expected = (model.logger.name_to_value[name] for model in (vpg, a2c))
        assert logged == pytest.approx(expected, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_vpg_is_a2c(case):
    *spaces_and_policy, kwargs = CASES[case]
    a2c, vpg = (train(algorithm, *spaces_and_policy, **kwargs) for algorithm in (A2C, VPG))
    assert_same_weights(vpg, a2c)
    assert_same_logs(vpg, a2c)
    untrained = VPG(spaces_and_policy[0], a2c.get_env(), policy_kwargs=a2c.policy_kwargs, use_sde=a2c.use_sde, seed=3)
    moved = [
        not th.allclose(before, after, atol=1e-3)
        for before, after in zip(untrained.policy.parameters(), vpg.policy.parameters())
    ]
    assert all(moved), "a weight that training does not move proves nothing"


def test_vpg_is_a2c_with_vec_normalize():
    def wrap(env):
        return VecNormalize(env, clip_obs=2.0)

    a2c, vpg = (train(algorithm, "MlpPolicy", VECTOR, FORCE, wrap) for algorithm in (A2C, VPG))
    assert_same_weights(vpg, a2c)


class Bonus(BaseCallback):
    """A reward of one's own: it is added at the end of a rollout, and the advantages are computed again."""

    def __init__(self, from_locals):
        super().__init__()
        self.from_locals = from_locals

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        rollout, policy = self.model.rollout_buffer, self.model.policy
        rollout.rewards += np.abs(rollout.observations).sum(axis=-1)
        with th.no_grad():
            own = policy.predict_values(policy.obs_to_tensor(self.locals["new_obs"])[0])
        rollout.compute_returns_and_advantage(self.locals["values"] if self.from_locals else own, self.locals["dones"])


@pytest.mark.parametrize("from_locals", [False, True])
@pytest.mark.parametrize("policy", ["MlpPolicy", OwnForward])
def test_vpg_is_a2c_with_a_callback_that_changes_rewards(policy, from_locals):
    a2c, vpg = (train(algorithm, policy, VECTOR, FORCE, callback=Bonus(from_locals)) for algorithm in (A2C, VPG))
    assert_same_weights(vpg, a2c)


class MeanEntropy(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob, entropy.mean()


def test_vpg_is_a2c_with_a_policy_that_returns_the_mean_of_its_entropies():
    a2c, vpg = (train(algorithm, MeanEntropy, VECTOR, FORCE, ent_coef=0.5) for algorithm in (A2C, VPG))
    assert_same_weights(vpg, a2c)
    assert_same_logs(vpg, a2c)


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_vpg_is_a2c_with_rollouts_of_one_step(normalize_advantage):
    a2c, vpg = (
        train(algorithm, "MlpPolicy", VECTOR, FORCE, n_steps=1, normalize_advantage=normalize_advantage)
        for algorithm in (A2C, VPG)
    )
    assert_same_weights(vpg, a2c)
