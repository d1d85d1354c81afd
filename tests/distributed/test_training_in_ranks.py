"""Several ranks must be one process with all their environments, and none may wait for ever."""

import itertools
import os
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from helpers.envs import CountingEnv, FaultyEnv
from helpers.ranks import in_ranks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_vpg import VPG
from sb3_vpg.common.collectives import running_statistics
from sb3_vpg.common.policy_runner import FastPolicyRunner
from sb3_vpg.common.progress_bar import AllRanksProgressBar
from sb3_vpg.diagnostics import GradientStatisticsCallback
from sb3_vpg.zoo.search_space import ESTIMATORS_WITH_BASELINES

pytestmark = pytest.mark.slow

SMALL = {"policy_kwargs": {"net_arch": [16]}, "device": "cpu"}


def weights(model: VPG) -> np.ndarray:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().numpy().copy()


# ---------------------------------------------------------------------------------------------------------------
# The same algorithm
# ---------------------------------------------------------------------------------------------------------------

# Three ways to use each formulation
WAYS: dict[str, dict[str, Any]] = {
    "mean over pieces or finished episodes": {"n_steps": 24, "normalize_advantage": False},
    "sum over normalised trajectories": {
        "n_steps": 24,
        "normalize_advantage": True,
        "loss_reduction": "trajectory",
        "ent_coef": 0.01,
        "discount_state_distribution": True,
    },
    "whole episodes": {"n_episodes": 2, "normalize_advantage": "batch", "max_grad_norm": None, "critic_learning_rate": 0.01},
}
CASES = [
    (*formulation, way)
    for formulation, way in itertools.product([*ESTIMATORS_WITH_BASELINES.values(), ("gae", "per episode")], WAYS)
]


def keywords_of(estimator: str, baseline: str | None, way: str) -> dict[str, Any]:
    if baseline == "per episode":
        return {**WAYS[way], "estimator": estimator, "normalize_advantage": "episode"}
    return {**WAYS[way], "estimator": estimator, "baseline": baseline}


def scripted_actions(self: FastPolicyRunner, obs: th.Tensor, with_values: bool) -> tuple[np.ndarray, None]:
    """Actions that depend on the observation alone: the rollouts are the same, whatever rounding does to the weights."""
    return (np.abs(obs.numpy()).sum(axis=1) * 1000).astype(np.int64) % 2, None


def train_with_scripted_actions(n_envs: int, cases: list[tuple[str, str | None, str]]) -> list[tuple[int, np.ndarray, dict]]:
    """:return: for each case timesteps, weights and some of what is logged, after three updates on CartPole"""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastPolicyRunner, "sample", scripted_actions)
        for case in cases:
            # Time limits, too
            env = make_vec_env("CartPole-v1", n_envs=n_envs, env_kwargs={"max_episode_steps": 20})
            model = VPG("MlpPolicy", env, seed=3, n_critic_updates=3, **SMALL, **keywords_of(*case))
            model.learn(1)
            for _ in range(2):
                model.learn(1, reset_num_timesteps=False)
            names = ("policy_loss", "entropy_loss", "value_loss", "policy_grad_norm", "episodes_per_update")
            logged = {name: model.logger.name_to_value.get(f"train/{name}") for name in names}
            results.append((model.num_timesteps, weights(model), logged))
    return results


@pytest.fixture(scope="module")
def trained_in_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks") / "cases"
    ranks = in_ranks(train_with_scripted_actions, 2, CASES, folder=folder)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=[" - ".join(map(str, case)) for case in CASES])
def test_two_ranks_are_one_process_with_all_environments(trained_in_two_ranks, case):
    ((n_steps, expected, logged),) = train_with_scripted_actions(4, [case])
    first, second = trained_in_two_ranks[case]
    assert np.array_equal(first[1], second[1])
    np.testing.assert_allclose(first[1], expected, rtol=0, atol=1e-6)
    assert first[2]["episodes_per_update"] == logged["episodes_per_update"]
    for name, value in logged.items():
        assert first[2][name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    # Each rank stops stepping when its own environments are done, sooner than one process would
    assert first[0] == second[0] <= n_steps


def test_the_rollouts_of_the_cases_differ_between_ranks_and_update_something(trained_in_two_ranks):
    """Else the test above could not fail."""
    env = make_vec_env("CartPole-v1", n_envs=4)
    before = weights(VPG("MlpPolicy", env, seed=3, **SMALL))
    for _, vector, _ in (ranks[0] for ranks in trained_in_two_ranks.values()):
        assert np.abs(vector - before).max() > 1e-3


class Trained(NamedTuple):
    n_updates: int
    n_timesteps: int
    rate: float
    weights: np.ndarray
    statistics: list[np.ndarray]
    n_own_steps: int
    first_observation: np.ndarray


class OwnSteps(BaseCallback):
    """Counts the steps of this rank, remembers its first observation and that timesteps never become fewer."""

    def _on_training_start(self) -> None:
        self.n_own_steps = self.before = 0
        self.first_observation = np.array(self.model._last_obs)

    def _on_step(self) -> bool:
        self.n_own_steps += self.training_env.num_envs
        assert self.model.num_timesteps > self.before
        self.before = self.model.num_timesteps
        return True


def train(env_id: str, n_envs: int, timesteps: int, normalize: bool = False, **kwargs: Any) -> Trained:
    env: VecEnv = make_vec_env(env_id, n_envs=n_envs)
    if normalize:
        env = VecNormalize(env)
    model = VPG("MlpPolicy", env, learning_rate=lambda remaining: 0.001 * remaining, **SMALL, **kwargs)
    callback = OwnSteps()
    model.learn(timesteps, callback)
    statistics = [x for one in running_statistics(model.get_vec_normalize_env()) for x in vars(one).values()]
    rate = model.policy.optimizer.param_groups[0]["lr"]
    own = (callback.n_own_steps, callback.first_observation)
    return Trained(model._n_updates, model.num_timesteps, rate, weights(model), statistics, *own)


@pytest.mark.parametrize(
    ("env_id", "timesteps", "kwargs"),
    [
        ("CartPole-v1", 6500, {"n_episodes": 1, "estimator": "reward_to_go", "baseline": "leave_one_out"}),
        ("CartPole-v1", 6000, {"n_episodes": 1, "estimator": "gae", "critic_batch_size": 16, "n_critic_updates": 2}),
        ("Pendulum-v1", 1536, {"n_steps": 8, "use_sde": True, "normalize": True, "scale_value_targets": True}),
    ],
    ids=["whole episodes", "minibatches", "gSDE and VecNormalize"],
)
def test_ranks_hold_the_same_weights_bit_by_bit_after_many_updates(tmp_path, env_id, timesteps, kwargs):
    # Three ranks: sums are then rounded, in whatever order they are taken
    ranks = in_ranks(partial(train, seed=0, **kwargs), env_id, 2, timesteps, folder=tmp_path / "ranks", size=3)
    first, *others = ranks
    assert first.n_updates >= 30
    for other in others:
        assert np.array_equal(other.weights, first.weights)
        assert all(map(np.array_equal, other.statistics, first.statistics))
        assert not np.array_equal(other.first_observation, first.first_observation)
        # Progress, and with it the schedule of the learning rate, is that of all
        assert (other.n_updates, other.n_timesteps, other.rate) == (first.n_updates, first.n_timesteps, first.rate)
    assert sum(rank.n_own_steps for rank in ranks) == first.n_timesteps >= timesteps
    assert len({rank.n_own_steps for rank in ranks}) == (1 if "n_steps" in kwargs else 3)


def length_of_progress_bar() -> tuple[float, int, list[str], int]:
    """:return: what the bar shows at the end, timesteps, values that are logged, how often a callback was initialized"""
    lengths, initialized = [], []

    class Counting(BaseCallback):
        def _init_callback(self) -> None:
            initialized.append(self.model)

        def _on_step(self) -> bool:
            return True

    class Spy(AllRanksProgressBar):
        def _on_training_end(self) -> None:
            super()._on_training_end()
            lengths.append(self.pbar.n)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # SB3's progress bar
        warnings.filterwarnings("ignore", "rich is experimental")
        patch.setattr("sb3_vpg.common.progress_bar.AllRanksProgressBar", Spy)
        model = VPG("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_episodes=2, verbose=1, tensorboard_log=".", **SMALL)
        model.learn(500, Counting(), progress_bar=True)
    outputs = [type(output).__name__ for output in model.logger.output_formats]
    return sum(lengths), model.num_timesteps, outputs, len(initialized)


def test_rank_0_alone_shows_the_progress_of_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = in_ranks(length_of_progress_bar, folder=tmp_path / "ranks")
    assert first[0] == first[1] >= 500
    assert second == (0, first[1], [], 1)
    assert first[3] == 1
    assert len(list(tmp_path.glob("VPG_*"))) == 1


def normalised_observations() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """:return: running statistics of the observations after five rollouts, and all that they have been updated with here"""
    seen, update = [], RunningMeanStd.update

    def update_and_remember(self: RunningMeanStd, observations: np.ndarray) -> None:
        if self.mean.shape == (4,):
            seen.append(observations)
        update(self, observations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningMeanStd, "update", update_and_remember)
        env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
        VPG("MlpPolicy", env, n_steps=16, seed=0, **SMALL).learn(5 * 16 * 2 * 2)
    return vars(env.obs_rms), np.concatenate(seen)


def test_normalisation_knows_what_all_ranks_have_seen(tmp_path):
    (first, seen), (second, seen_by_other) = in_ranks(normalised_observations, folder=tmp_path / "ranks")
    assert np.abs(seen.mean(axis=0) - seen_by_other.mean(axis=0)).max() > 0.01
    # SB3's statistics begin with 0.0001 observations of mean 0 and variance 1
    everything = np.concatenate([seen, seen_by_other]).astype(np.float64)
    n = len(everything) + 1e-4
    mean = everything.sum(axis=0) / n
    for own in (first, second):
        # Those of the reset and of five rollouts
        assert own["count"] == n == 2 * 2 * (1 + 5 * 16) + 1e-4
        np.testing.assert_allclose(own["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(own["var"], ((everything**2).sum(axis=0) + 1e-4) / n - mean**2, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Ranks that do not fit together
# ---------------------------------------------------------------------------------------------------------------


def learn_with_keyword_of_rank(keyword: str, values: list[Any]) -> None:
    kwargs = {"n_envs": 2, "timesteps": 100, keyword: values[dist.get_rank()]}
    env = make_vec_env("CartPole-v1", n_envs=kwargs.pop("n_envs"))
    timesteps = kwargs.pop("timesteps")
    if "norm_obs" in kwargs:
        env = VecNormalize(env, norm_obs=kwargs.pop("norm_obs"))
    VPG("MlpPolicy", env, **{**SMALL, **kwargs}).learn(timesteps)


def constant(value: float) -> Callable[[float], float]:
    return partial(_constant, value)


def _constant(value: float, progress_remaining: float) -> float:
    return value


@pytest.mark.parametrize(
    ("keyword", "values", "message"),
    [
        ("n_critic_updates", [3, 4], "n_critic_updates=4 in rank 1, but 3 in rank 0; allowed: the same"),
        ("baseline", [None, "value"], "baseline='value' in rank 1, but None in rank 0"),
        ("n_envs", [1, 2], "number of environments=2 in rank 1, but 1 in rank 0"),
        ("timesteps", [100, 200], "total_timesteps=200 in rank 1, but 100 in rank 0"),
        ("learning_rate", [constant(0.001), constant(0.1)], "learning_rate=[0.1, 0.1, 0.1] in rank 1, but [0.001"),
        ("policy_kwargs", [{"activation_fn": nn.Tanh}, {"activation_fn": nn.ReLU}], "policy_kwargs={'activation_fn': 'ReLU'}"),
        ("norm_obs", [True, False], "shapes of VecNormalize's statistics=[()] in rank 1, but [(4,), ()] in rank 0"),
    ],
)
def test_other_settings_in_another_rank_are_refused_in_all_and_named(tmp_path, keyword, values, message):
    for error in in_ranks(learn_with_keyword_of_rank, keyword, values, folder=tmp_path / "ranks"):
        assert isinstance(error, ValueError)
        assert message in str(error)


def make_models_that_are_refused() -> list[str]:
    """:return: the errors"""
    messages = []
    model = VPG("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.raises(ValueError, match="Batch normalization") as error:
        VPG("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": partial(nn.BatchNorm1d, 16), "net_arch": [16]})
    messages.append(str(error.value))
    # One episode in each rank is more than one episode
    VPG("MlpPolicy", "CartPole-v1", n_episodes=1, estimator="reward_to_go", baseline="leave_one_out", **SMALL).learn(1)
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="created in rank") as error:
        model.learn(1)
    messages.append(str(error.value))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return messages


def test_what_cannot_work_in_several_ranks_is_refused(tmp_path):
    for rank, messages in enumerate(in_ranks(make_models_that_are_refused, folder=tmp_path / "ranks")):
        assert "is split across 2 ranks; allowed: torch.nn.LayerNorm" in messages[0]
        assert f"created in rank {rank} of 2, but is trained in rank 0 of 1" in messages[1]


# ---------------------------------------------------------------------------------------------------------------
# Stopping and failing
# ---------------------------------------------------------------------------------------------------------------


class AtStep(BaseCallback):
    """Does something in one rank, at its 37th step."""

    def __init__(self, rank: int, what: Any):
        super().__init__()
        self.rank, self.what = rank, what

    def _on_step(self) -> bool:
        if dist.get_rank() == self.rank and self.n_calls == 37:
            return self.what()
        return True


def stop() -> bool:
    return False


def fail() -> bool:
    raise KeyError("no space left")


def die() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def hang_until(file: Path) -> bool:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return True


def learn_until(rank: int, what: Any) -> tuple[str, float, np.ndarray, int]:
    """:return: the error, if any, seconds from the 37th step to the end of learning, weights, timesteps"""
    model = VPG("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=16, **SMALL)
    start, error = time.monotonic(), ""
    try:
        model.learn(100_000, AtStep(rank, what))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return error, time.monotonic() - start, weights(model), model.num_timesteps


@pytest.mark.parametrize("rank", [0, 1])
def test_a_callback_that_stops_one_rank_stops_all(tmp_path, rank):
    results = in_ranks(learn_until, rank, stop, folder=tmp_path / "ranks")
    for error, _, vector, n_timesteps in results:
        assert error == ""
        assert np.array_equal(vector, results[0][2])
        # The third rollout of 16 steps x 2 environments, of which the stopped rank has five steps
        assert n_timesteps == 2 * 2 * 2 * 16 + 2 * 16 + 2 * 5


def learn_with_and_without_statistics_in_rank_0() -> tuple[np.ndarray, np.ndarray]:
    def learn(callback: BaseCallback | None) -> np.ndarray:
        env = make_vec_env(lambda: CountingEnv([3, 5]), n_envs=2, seed=0)
        return weights(VPG("MlpPolicy", env, n_steps=16, seed=0, **SMALL).learn(2 * 2 * 16 * 3, callback=callback))

    return learn(GradientStatisticsCallback(1) if dist.get_rank() == 0 else None), learn(None)


def test_gradient_statistics_in_one_rank_do_not_involve_the_others(tmp_path):
    ranks = in_ranks(learn_with_and_without_statistics_in_rank_0, folder=tmp_path / "ranks", timeout=20)
    for vector in itertools.chain(*ranks):
        np.testing.assert_array_equal(vector, ranks[0][1])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_one_rank_is_raised_in_all_and_tells_the_cause(tmp_path, rank):
    results = in_ranks(learn_until, rank, fail, folder=tmp_path / "ranks")
    assert results[rank][0] == "KeyError: 'no space left'"
    assert results[1 - rank][0] == f"RuntimeError: The rollout failed in rank {rank}: KeyError: 'no space left'"
    assert np.array_equal(results[0][2], results[1][2])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_missed_at_once(tmp_path, rank):
    results = in_ranks(learn_until, rank, die, folder=tmp_path / "ranks", timeout=60)
    assert results[rank] == -signal.SIGKILL
    error, seconds, *_ = results[1 - rank]
    assert error.startswith(f"RuntimeError: Rank {1 - rank} of 2 lost the connection to the other ranks: one of them exited")
    assert seconds < 30


def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path):
    folder = tmp_path / "ranks"
    # Until the other has returned
    results = in_ranks(learn_until, 1, partial(hang_until, folder / "outcome_0"), folder=folder, timeout=3)
    error, seconds, *_ = results[0]
    assert error.startswith("RuntimeError: Rank 0 of 2 lost the connection")
    assert "one took longer than the timeout" in error
    assert 3 <= seconds < 60


def learn_with_faulty_environment(rank: int) -> str:
    envs = [lambda: Monitor(CountingEnv([5])), lambda: Monitor(CountingEnv([5]))]
    if dist.get_rank() == rank:
        envs[1] = lambda: Monitor(FaultyEnv("reward", 4, 2, lengths=[5]))
    env = DummyVecEnv(envs)
    with pytest.raises((ValueError, RuntimeError)) as error:
        VPG("MlpPolicy", env, n_steps=8, **SMALL).learn(1000)
    return str(error.value)


def test_a_number_that_is_not_finite_in_one_rank_stops_all(tmp_path):
    own, other = in_ranks(learn_with_faulty_environment, 0, folder=tmp_path / "ranks")
    assert own.startswith("Non-finite reward in environment 1 at step ")
    assert other == f"The rollout failed in rank 0: ValueError: {own}"


# ---------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------


def train_and_save(path: Path) -> np.ndarray:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    model = VPG("MlpPolicy", env, n_episodes=1, seed=5, **SMALL).learn(500)
    if dist.get_rank() == 0:
        model.save(path)
        env.save(str(path.with_suffix(".pkl")))
    return weights(model)


def load_and_go_on(path: Path) -> tuple[np.ndarray, int, np.ndarray]:
    env = VecNormalize.load(str(path.with_suffix(".pkl")), make_vec_env("CartPole-v1", n_envs=2))
    model = VPG.load(path, env=env)
    callback = OwnSteps()
    model.learn(500, callback, reset_num_timesteps=False)
    return weights(model), model.num_timesteps, callback.first_observation


def test_what_rank_0_saves_goes_on_in_one_process_and_in_several(tmp_path):
    path = tmp_path / "model.zip"
    saved, _ = in_ranks(train_and_save, path, folder=tmp_path / "ranks")
    model = VPG.load(path, device="cpu")
    assert np.array_equal(weights(model), saved)
    n_timesteps = model.num_timesteps
    _, n_timesteps_then, _ = load_and_go_on(path)
    assert n_timesteps_then > n_timesteps >= 500
    runs = [in_ranks(load_and_go_on, path, folder=tmp_path / name) for name in ("once", "again")]
    (vector, steps, observation), (other_vector, other_steps, other_observation) = runs[0]
    assert np.array_equal(vector, other_vector)
    assert not np.array_equal(vector, saved)
    assert steps == other_steps >= n_timesteps + 500
    # Each rank has random numbers of its own, which are the same each time
    assert not np.array_equal(observation, other_observation)
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(*runs))


def seeds_of_environments(*seeds: int | None) -> list[list[int | None]]:
    """:return: those of the environments of a model for each seed"""
    envs = [make_vec_env("CartPole-v1", n_envs=3) for _ in seeds]
    for env, seed in zip(envs, seeds):
        VPG("MlpPolicy", env, seed=seed, **SMALL)
    return [list(env.unwrapped._seeds) for env in envs]


def test_seeds_are_those_of_one_process_with_all_environments(tmp_path):
    (unseeded, first), (others, second) = in_ranks(seeds_of_environments, None, 7, folder=tmp_path / "ranks")
    assert len({*unseeded, *others}) == 6
    assert first + second == list(range(7, 13))
