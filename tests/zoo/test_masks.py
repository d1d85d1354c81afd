"""Masks in the zoo: what calls predict() without masks must not take actions that are not allowed."""

import copy
import threading

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from test_maskable import ACTIONS, MaskedWalk, masked_envs, masked_model
from test_vpg_is_a2c import VECTOR, RandomWalk

from sb3_vpg import VPG
from sb3_vpg.envs import NativeVecEnv
from sb3_vpg.zoo.masks import (
    INVALID_ACTION_ENVS,
    MiniGridActionMasks,
    ZooMaskablePPO,
    attach_masks,
    register_invalid_action_envs,
)


class MaskedVectorEnv(SyncVectorEnv):
    def action_masks(self):
        return np.array([env.get_wrapper_attr("action_masks")() for env in self.envs])


def native_envs():
    return NativeVecEnv(MaskedVectorEnv([MaskedWalk] * 2, autoreset_mode=AutoresetMode.SAME_STEP))


ENVIRONMENTS = {
    **{name: lambda space=space: masked_envs(space) for name, space in ACTIONS.items()},
    "Dict": lambda: masked_envs(observation_space=spaces.Dict({"a": VECTOR, "b": VECTOR})),
    "normalized": lambda: VecNormalize(masked_envs(), training=False),
    "stacked": lambda: VecFrameStack(masked_envs(), 2),
    "processes": lambda: SubprocVecEnv([MaskedWalk] * 2),
    "native": native_envs,
}


@pytest.mark.parametrize("make", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_evaluation_takes_allowed_actions_only(make):
    # The environments refuse the others
    env = make()
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    model = masked_model(env, policy)
    assert attach_masks(env) is env
    evaluate_policy(model, env, n_eval_episodes=4, warn=False)
    evaluate_policy(model, env, n_eval_episodes=4, deterministic=False, warn=False)
    env.close()


def test_maskable_ppo_takes_allowed_actions_only():
    model = ZooMaskablePPO("MlpPolicy", masked_envs(), n_steps=8, batch_size=16, device="cpu").learn(16)
    evaluate_policy(model, attach_masks(masked_envs()), n_eval_episodes=4, deterministic=False, warn=False)


def test_without_masks_evaluation_takes_other_actions():
    with pytest.raises(AssertionError):
        evaluate_policy(masked_model(), masked_envs(), n_eval_episodes=4, warn=False)


def test_environments_are_not_copied_with_a_dict_of_observations():
    env = attach_masks(masked_envs(observation_space=spaces.Dict({"a": VECTOR, "b": VECTOR})))
    env.envs[0].unwrapped.handle = threading.Lock()
    model = masked_model(env, "MultiInputPolicy")
    model.predict(env.reset())
    observations = env.reset()
    copied = copy.deepcopy(observations)
    assert type(copied) is dict
    np.testing.assert_equal(copied, dict(observations))


def test_the_statistics_of_vec_normalize_can_be_saved(tmp_path):
    env = attach_masks(VecNormalize(masked_envs()))
    env.reset()
    env.save(tmp_path / "statistics.pkl")
    loaded = VecNormalize.load(tmp_path / "statistics.pkl", masked_envs())
    assert attach_masks(loaded).reset().action_masks.shape == (2, 4)


def test_a_model_that_was_trained_without_masks_does_not_use_them():
    env = attach_masks(masked_envs())
    model = masked_model(env)
    model.use_masking = False
    with pytest.raises(AssertionError):
        evaluate_policy(model, env, n_eval_episodes=4, warn=False)


def test_masks_that_are_given_take_precedence():
    env = attach_masks(masked_envs())
    only_the_last = np.array([[False, False, False, True]] * 2)
    actions, _ = masked_model(env).predict(env.reset(), action_masks=only_the_last)
    assert actions.tolist() == [3, 3]


def test_evaluation_during_training_has_masks_and_the_statistics_of_training():
    evaluation = attach_masks(VecNormalize(masked_envs(seed=5), training=False, norm_reward=False))
    env = VecNormalize(masked_envs())
    masked_model(env).learn(40, callback=EvalCallback(evaluation, n_eval_episodes=2, eval_freq=5, warn=False))
    assert evaluation.obs_rms.count > 10


def test_environments_without_masks_stay_as_they_are():
    env = DummyVecEnv([lambda: RandomWalk(VECTOR, ACTIONS["Discrete"])])
    attach_masks(env)
    assert type(env.reset()) is np.ndarray
    evaluate_policy(VPG("MlpPolicy", env), env, n_eval_episodes=1, warn=False)


def test_masks_of_another_form_do_not_matter_to_other_algorithms():
    class Forms(RandomWalk):
        def action_masks(self):
            return "up to one"

    env = attach_masks(DummyVecEnv([lambda: Forms(VECTOR, spaces.Box(-1, 1, (2,)))]))
    evaluate_policy(VPG("MlpPolicy", env), env, n_eval_episodes=1, warn=False)


@pytest.mark.parametrize("name", INVALID_ACTION_ENVS)
def test_the_best_return_of_the_masked_tasks_is_100(name):
    register_invalid_action_envs()
    # A second call has no effect, and issues no warning
    register_invalid_action_envs()
    env = gym.make(f"{name}-v0")
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    rewards, done = [], False
    while not done:
        mask = np.array(env.get_wrapper_attr("action_masks")())
        assert not mask.all()
        obs, reward, _, done, _ = env.step(obs)
        rewards.append(reward)
    assert sum(rewards) == 100


@pytest.mark.parametrize("env_id", ["MiniGrid-DoorKey-5x5-v0", "MiniGrid-Empty-5x5-v0", "MiniGrid-ObstructedMaze-1Dlhb-v0"])
def test_in_minigrid_an_action_is_allowed_if_it_changes_something(env_id):
    pytest.importorskip("minigrid")
    env = MiniGridActionMasks(gym.make(env_id))
    rng = np.random.default_rng(0)
    seen = set()

    def state(env):
        env = env.unwrapped
        carried = env.carrying and (env.carrying.type, env.carrying.color)
        return env.grid.encode().tolist(), tuple(env.agent_pos), env.agent_dir, carried

    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(100):
            allowed = env.action_masks()
            for action in range(7):
                changed = copy.deepcopy(env)
                _, _, done, _, _ = changed.step(action)
                assert (state(changed) != state(env) or done) == allowed[action], action
            action = int(rng.choice(np.flatnonzero(allowed)))
            seen.add(action)
            if any(env.step(action)[2:4]):
                break
    assert seen == ({0, 1, 2} if "Empty" in env_id else set(range(6)))
