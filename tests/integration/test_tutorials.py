"""
The tutorials' settings in hyperparams/tutorials, in short: what the zoo makes of each, what one update of it looks like, and
that a softmax over two linear functions is a logistic policy with weights to spare.
"""

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from helpers.installed import CHECKOUT, Environment, output_of

from sb3_vpg import VPG

TUTORIALS = CHECKOUT / "hyperparams" / "tutorials"

# ---------------------------------------------------------------------------------------------------------------
# As the zoo makes them
# ---------------------------------------------------------------------------------------------------------------

TRAIN = """
import argparse, json, sys
import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback


class Updates(BaseCallback):
    # What each update learns from
    def __init__(self):
        super().__init__()
        self.updates = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        rollout = self.model.rollout_buffer
        recorded = rollout.normalized_advantages()[rollout.mask]
        self.updates.append({
            "steps": rollout.n_recorded, "pieces": rollout.n_segments, "episodes": rollout.n_episodes,
            "first": int(rollout.steps[0].max()), "mean": float(recorded.mean()), "std": float(recorded.std(ddof=1)),
        })


def parameters(model, role):
    groups = [group for group in model.policy.optimizer.param_groups if group["role"] == role]
    return groups, [parameter.detach().clone() for group in groups for parameter in group["params"]]


facts = {}
for name, (env_id, config, overrides) in json.loads(sys.argv[1]).items():
    settings = dict(eval_freq=-1, log_interval=-1, device="cpu", verbose=0, seed=0)
    manager = ExperimentManager(argparse.Namespace(), "vpg", env_id, "short", config=config, hyperparams=overrides, **settings)
    model, _ = manager.setup_experiment()
    before = {role: parameters(model, role)[1] for role in ("actor", "critic")}
    updates = Updates()
    manager.callbacks.append(updates)
    manager.learn(model)
    fact = {"updates": updates.updates, "n_updates": model._n_updates, "optimizer": type(model.policy.optimizer).__name__}
    for role in before:
        groups, after = parameters(model, role)
        fact[role] = {
            "parameters": sum(parameter.numel() for parameter in after),
            "learning rate": groups[0]["lr"],
            "moved": any((one != other).any().item() for one, other in zip(before[role], after)),
        }
    facts[name] = fact
print(json.dumps(facts))
"""


def until(max_episodes: int) -> dict[str, Any]:
    return {"callback": [{"stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes": {"max_episodes": max_episodes}}]}


# Environment, and what makes it short
SHORT = {
    "logistic": ("CartPole-v0", until(4)),
    "softmax": ("CartPole-v0", {"n_timesteps": 64_000}),
    "swingup": ("CartPoleSwingUp-v0", {"n_timesteps": 256_000}),
    "standardized": ("CartPole-v0", until(4)),
    "value_baseline": ("CartPole-v1", {"n_timesteps": 500}),
    "spinning_up": ("CartPole-v1", {"n_timesteps": 8000}),
}


@pytest.fixture(scope="module")
def facts(installed: Environment) -> dict[str, Any]:
    """What the zoo makes of each tutorial, trained for one to three updates."""
    jobs = {name: (env_id, str(TUTORIALS / f"{name}.yml"), short) for name, (env_id, short) in SHORT.items()}
    process = installed.run_warm("-c", TRAIN, json.dumps(jobs))
    output_of(process)
    return json.loads(process.stdout.splitlines()[-1])


def test_no_tutorial_is_left_out():
    assert set(SHORT) == {path.stem for path in TUTORIALS.glob("*.yml")}


@pytest.mark.parametrize(
    ("name", "optimizer", "actor", "learning_rate"),
    [
        ("logistic", "SGD", 4, 0.002),
        # A weight for each observation and action, a bias for each action
        ("softmax", "Adam", 4 * 2 + 2, 0.1),
        # One standard deviation
        ("swingup", "Adam", (5 * 64 + 64) + (64 * 64 + 64) + (64 + 1) + 1, 0.01),
        ("standardized", "Adam", (4 * 128 + 128) + (128 * 2 + 2), 0.0003),
        ("value_baseline", "Adam", (4 * 64 + 64) + (64 * 2 + 2), 0.005),
        ("spinning_up", "Adam", (4 * 64 + 64) + (64 * 64 + 64) + (64 * 2 + 2), 0.0003),
    ],
)
def test_the_policy_is_the_tutorials(facts: dict[str, Any], name: str, optimizer: str, actor: int, learning_rate: float):
    assert facts[name]["optimizer"] == optimizer
    assert facts[name]["actor"] == {"parameters": actor, "learning rate": learning_rate, "moved": True}


@pytest.mark.parametrize("name", ["logistic", "softmax", "swingup", "standardized"])
def test_a_tutorial_without_value_function_trains_none(facts: dict[str, Any], name: str):
    assert not facts[name]["critic"]["moved"]


@pytest.mark.parametrize(
    ("name", "critic", "learning_rate"),
    [("value_baseline", (4 * 64 + 64) + (64 + 1), 0.01), ("spinning_up", (4 * 64 + 64) + (64 * 64 + 64) + (64 + 1), 0.001)],
)
def test_the_value_network_is_one_of_its_own(facts: dict[str, Any], name: str, critic: int, learning_rate: float):
    assert facts[name]["critic"] == {"parameters": critic, "learning rate": learning_rate, "moved": True}


@pytest.mark.parametrize(("name", "n_episodes"), [("logistic", 1), ("standardized", 1), ("value_baseline", 8)])
def test_each_update_has_its_whole_episodes(facts: dict[str, Any], name: str, n_episodes: int):
    for update in facts[name]["updates"]:
        assert update["pieces"] == update["episodes"] == n_episodes
        assert update["first"] == 0


@pytest.mark.parametrize("name", ["logistic", "standardized"])
def test_the_training_stops_before_the_update_of_its_last_episode(facts: dict[str, Any], name: str):
    # Hence 2001 and 5001 episodes in the files: 2000 and 5000 updates
    assert facts[name]["n_updates"] == len(facts[name]["updates"]) == 3
    (callback,) = entry_of(name)["callback"]
    assert callback in [until(2001)["callback"][0], until(5001)["callback"][0]]


@pytest.mark.parametrize(("name", "n_envs", "n_updates"), [("softmax", 32, 2), ("swingup", 256, 1), ("spinning_up", 4, 2)])
def test_each_update_has_its_steps_and_episodes_go_on_in_the_next(
    facts: dict[str, Any], name: str, n_envs: int, n_updates: int
):
    updates = facts[name]["updates"]
    assert [update["steps"] for update in updates] == [1000 * n_envs] * n_updates
    # Nearly all environments are in the middle of an episode when the rollout is over
    assert updates[0]["pieces"] > updates[0]["episodes"] > n_envs
    assert [update["first"] > 0 for update in updates] == [False, True][:n_updates]


@pytest.mark.parametrize("name", SHORT)
def test_returns_are_standardized_where_the_tutorial_does(facts: dict[str, Any], name: str):
    for update in facts[name]["updates"]:
        standardized = update["mean"] == pytest.approx(0, abs=1e-4) and update["std"] == pytest.approx(1, abs=1e-4)
        assert standardized is (name in ("standardized", "spinning_up"))


# ---------------------------------------------------------------------------------------------------------------
# One update by hand
# ---------------------------------------------------------------------------------------------------------------


def entry_of(name: str) -> dict[str, Any]:
    (entry,) = yaml.safe_load((TUTORIALS / f"{name}.yml").read_text()).values()
    return entry


def test_the_logistic_policy_goes_up_the_gradient_of_the_sum_over_its_episode():
    entry = {
        key: value for key, value in entry_of("logistic").items() if key not in ("n_timesteps", "callback", "policy_kwargs")
    }
    model = VPG(env=gym.make("CartPole-v1"), policy_kwargs={"optimizer_class": th.optim.SGD}, seed=0, device="cpu", **entry)
    weights = model.policy.action_net.weight
    theta = weights.detach().numpy().flatten().astype(np.float64)
    model.learn(1)

    x, actions = model.rollout_buffer.observations[:, 0], model.rollout_buffer.actions[:, 0, 0]
    n = len(x)
    assert model.rollout_buffer.n_episodes == 1
    # Reward 1 at each step: what is left of the episode, discounted
    reward_to_go = np.array([sum(0.99**k for k in range(n - t)) for t in range(n)])
    # grad log pi = (a - P(a = 1)) x
    probabilities = 1 / (1 + np.exp(-x @ theta))
    expected = theta + 0.002 * ((actions - probabilities) * reward_to_go) @ x
    np.testing.assert_allclose(weights.detach().numpy().flatten(), expected, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# 4 weights or 8
# ---------------------------------------------------------------------------------------------------------------

# No normalisation and no clipping, whose effect would depend on the norm of the gradient
REINFORCE = {
    "env": "CartPole-v1",
    "estimator": "reward_to_go",
    "n_episodes": 2,
    "normalize_advantage": False,
    "loss_reduction": "trajectory",
    "max_grad_norm": None,
    "device": "cpu",
}
LEARNING_RATES = {th.optim.SGD: 0.002, th.optim.Adam: 0.05}


def softmax(optimizer_class: type[th.optim.Optimizer] = th.optim.SGD, **kwargs: Any) -> VPG:
    return VPG("MlpPolicy", policy_kwargs={"net_arch": [], "optimizer_class": optimizer_class}, **REINFORCE, **kwargs)


def logistic(optimizer_class: type[th.optim.Optimizer] = th.optim.SGD, **kwargs: Any) -> VPG:
    return VPG("LogisticPolicy", policy_kwargs={"bias": True, "optimizer_class": optimizer_class}, **REINFORCE, **kwargs)


def start(model: VPG, theta: th.Tensor) -> VPG:
    """Let P(a = 1) be sigmoid(theta . x)."""
    with th.no_grad():
        # With a softmax, from half of theta against minus half of it
        rows = theta[None] if len(model.policy.action_net.weight) == 1 else th.stack([-theta / 2, theta / 2])
        model.policy.action_net.weight.copy_(rows)
        model.policy.action_net.bias.zero_()
    return model


def learn(model: VPG, n_timesteps: int) -> None:
    """With the same random numbers for all models: equal probabilities give equal actions."""
    model.set_random_seed(3)
    model.learn(n_timesteps)


def difference(model: VPG) -> np.ndarray:
    """:return: weights and bias of the logit of action 1, less those of action 0 where there are any"""
    weights = th.cat([model.policy.action_net.weight, model.policy.action_net.bias[:, None]], dim=1).detach().numpy()
    return weights[-1] - weights[0] if len(weights) == 2 else weights[0]


def probabilities(model: VPG) -> np.ndarray:
    obs = th.as_tensor(np.random.default_rng(0).normal(size=(64, 4)), dtype=th.float32)
    return model.policy.get_distribution(obs).distribution.probs[:, 1].detach().numpy()


THETA = th.tensor([0.5, -0.25, 2.0, 1.0])


def test_a_softmax_has_twice_the_weights_and_the_same_probabilities():
    models = [start(softmax(), THETA), start(logistic(), THETA)]
    assert [model.policy.action_net.weight.numel() for model in models] == [8, 4]
    np.testing.assert_allclose(probabilities(models[0]), probabilities(models[1]), rtol=1e-5)


def test_only_the_difference_of_the_rows_of_a_softmax_counts():
    model = start(softmax(), THETA)
    before = probabilities(model)
    with th.no_grad():
        model.policy.action_net.weight += th.tensor([3.0, -1.0, 0.5, 2.0])
    np.testing.assert_allclose(probabilities(model), before, rtol=1e-4)
    with th.no_grad():
        model.policy.action_net.weight[0] += 1.0
    assert np.abs(probabilities(model) - before).max() > 0.1


@pytest.mark.parametrize("optimizer_class", LEARNING_RATES)
def test_one_step_takes_a_softmax_twice_as_far(optimizer_class: type[th.optim.Optimizer]):
    # The gradient of one row is minus that of the other
    rate = LEARNING_RATES[optimizer_class]
    models = [start(make(optimizer_class, learning_rate=rate), THETA) for make in (softmax, logistic)]
    moved = []
    for model in models:
        before = difference(model)
        learn(model, 1)
        moved.append(difference(model) - before)
    assert np.abs(moved[1]).max() > 0.02
    np.testing.assert_allclose(moved[0], 2 * moved[1], atol=1e-5)


@pytest.mark.parametrize("optimizer_class", LEARNING_RATES)
def test_at_half_the_learning_rate_a_softmax_learns_what_a_logistic_policy_learns(
    optimizer_class: type[th.optim.Optimizer],
):
    rate = LEARNING_RATES[optimizer_class]
    models = [
        start(softmax(optimizer_class, learning_rate=rate / 2), THETA),
        start(logistic(optimizer_class, learning_rate=rate), THETA),
    ]
    for model in models:
        learn(model, 1500)
    # The same episodes, step by step
    assert models[0]._n_updates == models[1]._n_updates >= 10
    assert models[0].num_timesteps == models[1].num_timesteps
    assert np.abs(difference(models[1])[:4] - THETA.numpy()).max() > 0.1
    np.testing.assert_allclose(difference(models[0]), difference(models[1]), rtol=1e-3)
    np.testing.assert_allclose(probabilities(models[0]), probabilities(models[1]), rtol=1e-3)
