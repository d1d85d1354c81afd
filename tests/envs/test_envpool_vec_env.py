"""EnvPoolVecEnv must keep what SB3's VecEnv promises, with the numbers that EnvPool's own pools give."""

import copy
import os
import signal
import sys
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from helpers.envs import CountingEnv
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs import EnvPoolVecEnv

envpool = pytest.importorskip("envpool")

CARTPOLE, PENDULUM, HOPPER = "CartPole-v1", "Pendulum-v1", "Hopper-v5"


def make(env_id=CARTPOLE, n_envs=3, seed=0, max_episode_steps=None, **kwargs):
    if max_episode_steps is not None:
        kwargs["env_kwargs"] = {"max_episode_steps": max_episode_steps}
    env = make_vec_env(env_id, n_envs, seed=seed, vec_env_cls=EnvPoolVecEnv, **kwargs)
    assert type(env) is EnvPoolVecEnv
    return env


def random_actions(env, n_steps, seed=0):
    """Actions of shape (T, N, ...)"""
    rng = np.random.default_rng(seed)
    space, shape = env.action_space, (n_steps, env.num_envs)
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=shape)
    return rng.uniform(space.low, space.high, (*shape, *space.shape)).astype(np.float32)


def play(env, actions):
    """What the reset gives, and for each step observations, rewards, dones, infos."""
    return [env.reset(), *(env.step(a) for a in actions)]


def numbers(steps):
    """Observations, rewards, dones, infos without times."""
    infos = [[{k: v if k != "episode" else (v["r"], v["l"]) for k, v in info.items()} for info in s[3]] for s in steps[1:]]
    return [steps[0], *((*step[:3], info) for step, info in zip(steps[1:], infos))]


def play_alone(env_id, seed, actions, time_limit):
    """One environment in a pool of its own, driven by hand: observations, rewards, dones, infos as a VecEnv should give."""
    pool = envpool.make_gymnasium(env_id, num_envs=1, env_seed=[seed], max_episode_steps=10 * time_limit)
    observation, _ = pool.reset()
    observations, rewards, dones, infos = [observation[0]], [], [], []
    episode = []
    for action in actions:
        observation, reward, terminated, _, _ = pool.step(action[None])
        episode.append(float(reward[0]))
        ended = bool(terminated[0]) or len(episode) == time_limit
        infos.append({"TimeLimit.truncated": ended and not terminated[0]})
        if ended:
            infos[-1] |= {"terminal_observation": observation[0], "episode": (round(sum(episode), 6), len(episode))}
            observation, _ = pool.reset()
            episode = []
        for row, value in ((observations, observation[0]), (rewards, reward[0]), (dones, ended)):
            row.append(value)
    return observations, rewards, dones, infos


def endings(steps):
    """For each episode that has ended, whether that was by the time limit, and its length."""
    return [(info["TimeLimit.truncated"], info["episode"]["l"]) for s in steps[1:] for info in s[3] if "episode" in info]


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
@pytest.mark.parametrize("env_id", [CARTPOLE, PENDULUM, HOPPER])
def test_steps_are_those_of_pools_driven_by_hand(env_id):
    time_limit = 17
    env = make(env_id, 3, seed=5, max_episode_steps=time_limit)
    actions = random_actions(env, 60)
    steps = numbers(play(env, actions))
    for i in range(3):
        observations, rewards, dones, infos = play_alone(env_id, 5 + i, actions[:, i], time_limit)
        np.testing.assert_array_equal(steps[0][i], observations[0])
        for step, observation, reward, done, info in zip(steps[1:], observations[1:], rewards, dones, infos):
            np.testing.assert_array_equal(step[0][i], observation)
            assert (step[1][i], step[2][i]) == (np.float32(reward), done)
            terminal, expected = step[3][i].pop("terminal_observation", None), info.pop("terminal_observation", None)
            np.testing.assert_equal(terminal, expected)
            if "episode" in info:
                assert step[3][i]["episode"] == pytest.approx(info.pop("episode"), rel=1e-5)
                step[3][i].pop("episode")
            assert step[3][i] == info
    truncated = dict(endings(play(env, actions)))
    assert truncated.keys() == ({True} if env_id == PENDULUM else {True, False})


def test_all_that_ended_are_reset_in_one_call(monkeypatch):
    env = make(PENDULUM, 4, max_episode_steps=3)
    env.reset()
    calls, pool = [], env.vector_env._pool
    reset = type(pool).reset
    monkeypatch.setattr(type(pool), "reset", lambda self, *args: calls.append(args) or reset(self, *args))
    for action in random_actions(env, 7):
        env.step(action)
    assert [ids.tolist() for (ids,) in calls] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("shorter", [0, 1])
@pytest.mark.parametrize("create", [make, EnvPoolVecEnv])
def test_a_time_limit_in_the_step_that_terminates_is_no_truncation(create, shorter):
    ones = np.ones((40, 1), dtype=int)
    ((_, length), *_) = endings(play(create(CARTPOLE, 1, seed=0), ones))
    limited = create(CARTPOLE, 1, seed=0, max_episode_steps=length - shorter)
    assert endings(play(limited, ones))[0] == (bool(shorter), length - shorter)


@pytest.mark.parametrize(
    "env",
    [
        lambda: EnvPoolVecEnv(PENDULUM, 1, max_episode_steps=3),
        lambda: make_vec_env(PENDULUM, 1, vec_env_cls=EnvPoolVecEnv, vec_env_kwargs={"max_episode_steps": 3}),
        lambda: make_vec_env(
            PENDULUM,
            1,
            vec_env_cls=EnvPoolVecEnv,
            env_kwargs={"max_episode_steps": 3},
            vec_env_kwargs={"max_episode_steps": 5},
        ),
    ],
    ids=["id", "functions", "both"],
)
def test_the_shortest_time_limit_counts(env):
    assert endings(play(env(), np.zeros((7, 1, 1)))) == [(True, 3)] * 2


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
def test_ids_that_gymnasium_knows_but_does_not_create():
    with pytest.raises(ImportError):
        gym.make("Ant-v3")
    env = EnvPoolVecEnv("Ant-v3", 2)
    assert env.reset().shape == env.step(np.zeros((2, 8)))[0].shape


def test_a_game_without_raw_rewards(tmp_path, monkeypatch):
    # VizDoom writes a file there
    monkeypatch.chdir(tmp_path)
    env = EnvPoolVecEnv("D1Basic-v1", 2)
    env.reset()
    assert env.step(np.zeros((2, 3)))[1].shape == (2,)


@pytest.mark.parametrize("env_id", [CARTPOLE, PENDULUM, HOPPER, "FrozenLake-v1"])
def test_spaces_and_types_are_those_of_dummy_vec_env(env_id):
    envs = [make(env_id, 2), make_vec_env(env_id, 2, seed=0)]
    results = []
    for env in envs:
        (observations, (new_observations, rewards, dones, infos)) = play(env, random_actions(env, 1))
        arrays = (observations, new_observations, rewards, dones)
        results.append([(x.dtype, x.shape) for x in arrays] + [[info["TimeLimit.truncated"] for info in infos]])
        assert env.observation_space.contains(observations[0])
    assert results[0] == results[1]
    assert envs[0].observation_space == envs[1].observation_space
    assert envs[0].action_space == envs[1].action_space


def test_what_was_given_stays_as_it_was():
    env = make(max_episode_steps=5)
    given = play(env, random_actions(env, 20))
    kept = copy.deepcopy(given)
    play(env, random_actions(env, 20, seed=1))
    np.testing.assert_equal(given, kept)


def test_monitor_files_are_as_with_dummy_vec_env(tmp_path):
    files = {}
    for cls in (EnvPoolVecEnv, DummyVecEnv):
        folder = tmp_path / cls.__name__
        env = make_vec_env(CARTPOLE, 2, seed=0, vec_env_cls=cls, monitor_dir=str(folder))
        steps = play(env, random_actions(env, 100))
        env.close()
        header = (folder / "0.monitor.csv").read_text().splitlines()[:2]
        files[cls] = (sorted(os.listdir(folder)), header[0].split('"env_id"')[1], header[1])
        results = load_results(str(folder))
        lengths = [length for _, length in endings(steps)]
        assert sorted(results["l"]) == sorted(lengths) != []
        assert sorted(results["r"]) == sorted(map(float, lengths))
        assert (results["t"] >= 0).all()
    assert files[EnvPoolVecEnv] == files[DummyVecEnv]


def test_info_keywords_name_infos_of_envpool(tmp_path):
    keywords = {"monitor_kwargs": {"info_keywords": ("x_position",)}, "monitor_dir": str(tmp_path)}
    env = make(HOPPER, 2, max_episode_steps=4, **keywords)
    _, *steps = play(env, random_actions(env, 5))
    assert all("x_position" in info for _, _, _, infos in steps for info in infos)
    positions = [info["episode"]["x_position"] for info in steps[3][3]]
    env.close()
    assert sorted(load_results(str(tmp_path))["x_position"]) == pytest.approx(sorted(positions))
    # The position after the last step, not after the reset
    assert min(map(abs, positions)) > 1e-3
    with pytest.raises(ValueError, match=r"Hopper-v5 has no info 'color'; it has \["):
        make(HOPPER, 2, monitor_kwargs={"info_keywords": ("color",)})


# ---------------------------------------------------------------------------------------------------------------
# Seeds, copies, close
# ---------------------------------------------------------------------------------------------------------------


def test_the_seed_determines_everything():
    env = make()
    actions = random_actions(env, 40)
    first, second, other = (env.seed(seed) and numbers(play(env, actions)) for seed in (5, 5, 6))
    np.testing.assert_equal(first, second)
    assert not np.array_equal(first[0], other[0])
    # Environment i has the seed plus i
    np.testing.assert_array_equal(first[0][1:], other[0][:-1])
    # A seed is for one reset
    assert not np.array_equal(env.reset(), other[0])
    # However many threads there are
    threads = {"num_threads": 2}
    for twin in (EnvPoolVecEnv(CARTPOLE, 3, seed=5, **threads), make(seed=5, vec_env_kwargs=threads)):
        assert twin.vector_env.options["num_threads"] == 2
        np.testing.assert_equal(numbers(play(twin, actions)), first)


def test_seeds_that_nobody_chose_differ():
    for create in (partial(make, seed=None), lambda: EnvPoolVecEnv(CARTPOLE, 3)):
        assert not np.array_equal(create().reset(), create().reset())


def test_seeds_are_taken_modulo_what_envpool_has():
    # SB3 and the zoo draw seeds of 32 bits without a sign; EnvPool has one bit less
    first, second = make(seed=2**32 - 1).reset(), make(seed=2**31 - 1).reset()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[1:], make(seed=0).reset()[:2])


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_what_is_no_seed_is_refused(seed):
    match = "seed=.* is not allowed; allowed: an integer of at least 0"
    with pytest.raises(ValueError, match=match):
        EnvPoolVecEnv(CARTPOLE, 3, seed=seed)
    with pytest.raises(ValueError, match=match):
        make().vector_env.reset(seed=seed)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda env: cloudpickle.loads(cloudpickle.dumps(env))], ids=["copy", "pickle"]
)
def test_a_copy_needs_a_reset_and_begins_with_the_seed(copy_of):
    env = make()
    actions = random_actions(env, 30)
    expected = numbers(play(env, actions))
    twin = copy_of(env)
    assert type(twin) is EnvPoolVecEnv
    with pytest.raises(RuntimeError, match=r"need a reset: call reset\(\) first"):
        twin.step(actions[0])
    twin.seed(0)
    np.testing.assert_equal(numbers(play(twin, actions)), expected)
    # The original goes on
    env.step(actions[0])


def test_nothing_moves_before_the_first_reset():
    with pytest.raises(RuntimeError, match=r"need a reset: call reset\(\) first"):
        make().step([0, 1, 0])


@pytest.mark.parametrize("was_reset", [False, True])
def test_a_closed_environment_cannot_be_used(was_reset):
    env = make()
    if was_reset:
        env.reset()
    env.close()
    env.close()
    for use in (env.reset, lambda: env.vector_env.step([0, 1, 0]), lambda: env.seed(1) and env.reset()):
        with pytest.raises(RuntimeError, match="The environments are closed"):
            use()
    assert env.vector_env.closed


def test_options_of_a_reset_are_refused():
    env = make()
    env.set_options({"low": -0.2})
    with pytest.raises(ValueError, match=r"no reset options: \{'low': -0.2\}"):
        env.reset()


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cartpole():
    env = make()
    env.reset()
    return env


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 1], r"actions have shape \(2,\); allowed: \(3,\)"),
        ([0, 1, 0, 1], r"actions have shape \(4,\)"),
        ([[0], [1], [0]], r"actions have shape \(3, 1\)"),
        ([0.0, 1.0, 0.0], r"actions have dtype float64; allowed: the one of Discrete\(2\)"),
        ([0, 1, None], "actions have dtype object"),
        ([0, 1, 2], r"The action of environment 2 is not in Discrete\(2\): 2"),
        ([0, -1, 1], r"The action of environment 1 is not in Discrete\(2\): -1"),
    ],
)
def test_bad_actions_are_refused(cartpole, actions, message):
    with pytest.raises(ValueError, match=message):
        cartpole.step(actions)
    cartpole.step([0, 1, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_action_that_is_not_finite_is_refused(bad):
    env = make(PENDULUM, 2)
    env.reset()
    with pytest.raises(ValueError, match="The action of environment 1 is not finite"):
        env.step(np.array([[0.0], [bad]], dtype=np.float32))
    env.step(np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("HalfCheeta-v5", 2), {}, "no environment 'HalfCheeta-v5'; similar ids: HalfCheetah-v5, "),
        (("?", 2), {}, r"no environment '\?'. envpool.list_all_envs\(\) gives all ids"),
        ((CARTPOLE, 0), {}, "n_envs=0 is not allowed; allowed: an integer of at least 1"),
        ((CARTPOLE, True), {}, "n_envs=True is not allowed"),
        ((CARTPOLE, 2), {"num_threads": 0}, "num_threads=0 is not allowed"),
        ((CARTPOLE, 2), {"num_threads": 1.5}, "num_threads=1.5 is not allowed"),
        ((CARTPOLE, 2), {"max_episode_steps": 0}, "max_episode_steps=0 is not allowed; allowed: an integer of at least 1"),
        (("Pong-v5", 2), {"noop_max": 0}, "noop_max=0 is not allowed"),
        (("Pong-v5", 2), {"img_height": 0}, "img_height=0 is not allowed"),
        ((HOPPER, 2), {"frame_skip": 0}, "frame_skip=0 is not allowed"),
        ((CARTPOLE, 2), {"gravity": 9.81}, "CartPole-v1 has no option 'gravity'; it has max_episode_steps, "),
        ((CARTPOLE, 2), {"batch_size": 1}, "CartPole-v1 has no option 'batch_size'"),
        ((HOPPER, 2), {"frame_skip": 1.5}, "frame_skip=1.5 is not allowed; allowed: int, such as 4"),
        ((HOPPER, 2), {"ctrl_cost_weight": "much"}, "ctrl_cost_weight='much' is not allowed; allowed: float"),
        (("Go9x9-v1", 2), {}, "EnvPool's Go9x9-v1 has several players; SB3 supports one"),
        (([lambda: gym.make(PENDULUM)],), {"time_limit": 5}, "EnvPool's Pendulum-v1 has no option 'time_limit'"),
        (([],), {}, "There are no environments"),
        (([lambda: gym.make(CARTPOLE)], 1), {}, "n_envs=1 is allowed with an id only"),
        (([CountingEnv],), {}, "EnvPool cannot replace <CountingEnv.*: it is not registered"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        EnvPoolVecEnv(*arguments, **options)


def test_an_environment_that_envpool_lacks_is_refused():
    with pytest.raises(ValueError, match="EnvPool has no environment 'CartPoleSwingUp-v1'; similar ids: "):
        make("CartPoleSwingUp-v1")


def use_in_fork(env, file):
    for use in (lambda: env.step([0, 1]), env.reset, lambda: env.seed(1) and env.reset()):
        with pytest.raises(RuntimeError, match=r"EnvPool's threads do not exist in a forked process\. Create .* there"):
            use()
    env.close()
    file.write_text(str(make(n_envs=2).reset().tolist()))


# Python 3.12 warns of forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_is_refused_and_can_create_its_own(tmp_path):
    env = EnvPoolVecEnv(CARTPOLE, 2, seed=0, num_threads=2)
    first = env.reset()
    child = os.fork()
    if child == 0:
        # If a call hangs, this ends the process
        signal.alarm(20)
        try:
            use_in_fork(env, tmp_path / "reset")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "reset").read_text() == str(first.tolist())
    # Worker processes that are forks
    workers = make_vec_env(CARTPOLE, 2, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    np.testing.assert_array_equal(workers.reset(), make_vec_env(CARTPOLE, 2, seed=0).reset())
    env.step([0, 1])
    workers.close()


@pytest.mark.parametrize("create", [lambda: EnvPoolVecEnv(CARTPOLE, 2), make], ids=["id", "make_vec_env"])
def test_without_envpool_the_error_has_the_command_that_installs_it(monkeypatch, create):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"EnvPool is not installed: pip install 'sb3_vpg\[envpool\]'"):
        create()


# ---------------------------------------------------------------------------------------------------------------
# With the rest of SB3
# ---------------------------------------------------------------------------------------------------------------


def test_wrappers_and_attributes_are_those_of_the_environments():
    with_monitor, without = make(n_envs=2), EnvPoolVecEnv([lambda: gym.make(CARTPOLE)] * 2)
    assert with_monitor.env_is_wrapped(Monitor) == [True, True]
    assert without.env_is_wrapped(Monitor) == [False, False]
    assert EnvPoolVecEnv(CARTPOLE, 2).env_is_wrapped(Monitor) == [True, True]
    for env in (with_monitor, EnvPoolVecEnv(CARTPOLE, 2)):
        assert [spec.id for spec in env.get_attr("spec")] == [CARTPOLE] * 2
        assert env.get_attr("action_space") == [env.action_space] * 2
        assert not env.has_attr("state")
        assert env.render_mode is None
        assert list(env.get_images()) == [None, None]
    steps = play(VecMonitor(without), np.ones((30, 2), dtype=int))
    assert endings(steps)
    assert not endings(play(without, np.ones((30, 2), dtype=int)))


def test_two_pools_in_one_process_do_not_disturb_each_other():
    envs = [make(), make(), make(PENDULUM)]
    actions = [random_actions(env, 40) for env in envs]
    expected = numbers(play(make(), actions[0]))
    steps = [[env.reset()] for env in envs]
    for row in zip(*actions):
        for env, action, kept in zip(envs, row, steps):
            kept.append(env.step(action))
    np.testing.assert_equal(numbers(steps[0]), expected)
    np.testing.assert_equal(numbers(steps[1]), expected)


def test_normalization_and_stacks_see_terminal_observations():
    env = make(n_envs=2, max_episode_steps=6)
    stacked = VecFrameStack(VecNormalize(make(n_envs=2, max_episode_steps=6), norm_obs=False), 3)
    actions = random_actions(env, 8)
    plain, frames = play(env, actions), play(stacked, actions)
    np.testing.assert_array_equal(frames[6][3][0]["terminal_observation"][-4:], plain[6][3][0]["terminal_observation"])
    np.testing.assert_array_equal(frames[6][3][0]["terminal_observation"][:4], plain[4][0][0])
    # A new episode begins with empty frames
    np.testing.assert_array_equal(frames[6][0], np.concatenate([np.zeros((2, 8)), plain[6][0]], axis=1))
    normalized = VecNormalize(make(n_envs=2))
    observations = np.concatenate([step[0] for step in play(normalized, random_actions(env, 50))[1:]])
    np.testing.assert_allclose(normalized.obs_rms.count, 102, atol=1)
    assert np.abs(observations).max() <= 10


@pytest.mark.parametrize("algorithm", [VPG, A2C, PPO])
def test_a_model_is_trained_evaluated_saved_and_loaded(algorithm, tmp_path):
    kwargs = {"n_steps": 16, "seed": 0, "policy_kwargs": {"net_arch": [16]}}
    if algorithm is PPO:
        kwargs["batch_size"] = 32
    env = make(PENDULUM, 4, max_episode_steps=20)
    evaluate = EvalCallback(
        make(PENDULUM, 2, max_episode_steps=20), n_eval_episodes=4, eval_freq=32, log_path=str(tmp_path), verbose=0, warn=True
    )
    model = algorithm("MlpPolicy", env, **kwargs).learn(256, callback=evaluate)
    assert [episode["l"] for episode in model.ep_info_buffer] == [20] * 12
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        np.testing.assert_array_equal(evaluations["ep_lengths"], [[20] * 4] * 2)
    # A warning would be an error: the environments have a Monitor
    env.seed(1)
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=5, return_episode_rewards=True)
    assert lengths == [20] * 5
    assert max(returns) < 0

    # Neither may a warning be given here: EnvPool's random numbers cannot be saved
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make(PENDULUM, 4, max_episode_steps=20))
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256 + 64
    for other in (make_vec_env(PENDULUM, 4), env):
        loaded.set_env(other)
        loaded.learn(64)
        assert loaded.num_timesteps == 64


@pytest.mark.parametrize("kwargs", [{"n_episodes": 1}, {"n_steps": 8, "estimator": "reward_to_go"}], ids=str)
def test_vpg_takes_whole_episodes(kwargs):
    model = VPG("MlpPolicy", make(), seed=0, policy_kwargs={"net_arch": [16]}, **kwargs).learn(1)
    buffer = model.rollout_buffer
    assert buffer.n_episodes == buffer.n_segments >= 3
    assert buffer.rewards[buffer.mask].sum() == buffer.mask.sum() == sum(info["l"] for info in model.ep_info_buffer)
