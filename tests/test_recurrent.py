"""RecurrentVPG: sb3-contrib's RecurrentPPO is the oracle, and the update must see what the rollout has seen."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.models import Normalized, Spy, assert_same_weights, weights
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_vpg_is_a2c import FORCE, IMAGE, VECTOR, RandomWalk

from sb3_vpg import VPG, RecurrentVPG
from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.common.recurrent_runner import FastRecurrentRunner, RecurrentRunner, States, cuts, has_contrib_forward

SMALL = {"net_arch": [8], "lstm_hidden_size": 8}
SGD = {**SMALL, "optimizer_class": th.optim.SGD}
#: Ways in which the critic may remember
CRITICS = {
    "separate": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "none": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
}
each_critic = pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS)


def walks(observation_space=VECTOR, action_space=None, n_envs=3):
    env = DummyVecEnv([lambda: RandomWalk(observation_space, action_space or spaces.Discrete(3))] * n_envs)
    env.seed(1)
    return env


def recurrent_model(env=None, policy="MlpLstmPolicy", critic=None, **keywords):
    env = walks() if env is None else env
    keywords = {"n_steps": 12, "seed": 0, "policy_kwargs": {**SMALL, **(critic or {})}, "device": "cpu", **keywords}
    return RecurrentVPG(policy, env, **keywords)


# ---------------------------------------------------------------------------------------------------------------
# The same as RecurrentPPO with one epoch
# ---------------------------------------------------------------------------------------------------------------

CASES = {
    **{f"critic: {name}": ("MlpLstmPolicy", VECTOR, None, {**SGD, **critic}, {}) for name, critic in CRITICS.items()},
    "two dimensions": ("MlpLstmPolicy", VECTOR, spaces.Box(-1, 1, (2, 2)), SGD, {}),
    "box, entropy bonus": ("MlpLstmPolicy", VECTOR, FORCE, SGD, {"ent_coef": 0.1}),
    "multi-discrete": ("MlpLstmPolicy", VECTOR, spaces.MultiDiscrete([2, 3]), SGD, {"normalize_advantage": True}),
    "dict": ("MultiInputLstmPolicy", spaces.Dict({"a": VECTOR, "b": FORCE}), None, SGD, {}),
    "CNN": ("CnnLstmPolicy", IMAGE, None, {**SGD, "features_extractor_kwargs": {"features_dim": 16}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_recurrent_ppo_with_one_epoch(case, monkeypatch):
    policy, observation_space, action_space, policy_kwargs, keywords = CASES[case]
    # RecurrentPPO cuts one sequence at a random step, where the gradient ends
    monkeypatch.setattr("sb3_contrib.common.recurrent.buffers.np.random.randint", lambda *_: 0)
    common = {"n_steps": 12, "gamma": 0.9, "gae_lambda": 1.0, "learning_rate": 0.01, "normalize_advantage": False, "seed": 3}
    common |= {"policy_kwargs": policy_kwargs, "device": "cpu", **keywords}
    own = {"n_critic_updates": 1, "max_grad_norm": None}
    ppo = {"n_epochs": 1, "batch_size": 36, "max_grad_norm": 1e9}
    first, second = (
        algorithm(policy, walks(observation_space, action_space), **common, **further).learn(360)
        for algorithm, further in ((RecurrentVPG, own), (RecurrentPPO, ppo))
    )
    start = weights(RecurrentVPG(policy, walks(observation_space, action_space), **common, **own))
    for name, values in weights(first).items():
        np.testing.assert_allclose(values, weights(second)[name], rtol=1e-3, atol=2e-5, err_msg=name)
        assert not np.array_equal(values, start[name]), name


# ---------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"estimator": "reward_to_go"},
        {"estimator": "total_return", "baseline": "value", "n_episodes": 2},
        {"estimator": "td_residual", "partial_episodes": "truncate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fast", [True, False])
@each_critic
def test_the_update_sees_the_probabilities_and_values_of_the_rollout(critic, fast, keywords, monkeypatch):
    """Through episodes that begin in the middle of a rollout, and rollouts that begin in the middle of an episode."""
    if not fast:
        # The policy itself takes the steps, and the log probabilities are its own
        monkeypatch.setattr("sb3_vpg.rollout.make_recurrent_runner", RecurrentRunner)
    seen = []

    def compare(spy):
        model, buffer = spy.model, spy.model.recorder
        buffer.compute_returns_and_advantage(th.zeros(3), np.zeros(3, dtype=bool))
        for batch_size in (None, 1):
            for indices in buffer.batch_indices(batch_size):
                inputs = buffer.flat_inputs(indices)
                actions = buffer.to_torch(buffer.actions.reshape(-1, 1)[indices])
                with th.no_grad():
                    runner = model._make_runner()
                    values, log_prob, _ = runner.evaluate(buffer.flat_observations(indices), actions, True, **inputs)
                    alone = runner.values(buffer.flat_observations(indices), **inputs)
                if not fast:
                    np.testing.assert_allclose(log_prob, buffer.log_probs.reshape(-1)[indices], atol=1e-5)
                if model.plan.uses_value_function:
                    np.testing.assert_allclose(values, buffer.values.reshape(-1)[indices], atol=1e-5)
                np.testing.assert_allclose(alone, values, atol=1e-5)
                seen.append((batch_size, len(indices)))

    model = recurrent_model(critic=critic, **keywords)
    model.learn(150, callback=Spy(compare, "rollout_end"))
    n_recorded = model.recorder.n_recorded
    assert isinstance(model._make_runner(), FastRecurrentRunner) == fast
    assert (None, n_recorded) in seen
    # One environment at a time
    assert sum(n for size, n in seen[-3:] if size == 1) == n_recorded


@each_critic
def test_the_value_at_a_time_limit_has_the_state_of_the_critic_there(critic):
    model = recurrent_model(critic=critic, gamma=1.0, gae_lambda=1.0)
    before = copy.deepcopy(model.policy)
    model.learn(36)
    buffer: VPGBufferMixin = model.recorder
    limits = buffer._time_limits
    assert limits
    for (row, env_index), terminal_obs in zip(limits, buffer._terminal_obs):
        # The whole episode once more, one observation after the other
        begin = row - buffer.steps[row, env_index]
        observations = [*buffer.observations[begin : row + 1, env_index], terminal_obs]
        states = model._first_states
        states = type(states)(*(tuple(part[:, :1] * 0 for part in state) for state in states))
        for obs in observations:
            tensor = th.as_tensor(obs)[None]
            with th.no_grad():
                value = before.predict_values(tensor, states.vf, th.zeros(1))
                *_, states = before(tensor, states, th.zeros(1))
        assert buffer.rollout.next_values[row, env_index] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_the_value_after_the_last_step_has_the_state_of_the_critic():
    model = recurrent_model(n_steps=4)
    before = copy.deepcopy(model.policy)
    model.learn(12)
    buffer = model.recorder
    env_index = int(np.argmin(buffer.ends[-1]))
    assert not buffer.ends[-1, env_index]
    with th.no_grad():
        values = before.predict_values(th.as_tensor(model._last_obs), model._lstm_states.vf, th.zeros(3)).flatten()
    assert buffer.rollout.next_values[-1, env_index] == pytest.approx(values[env_index].item(), rel=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"estimator": "reward_to_go"}, {"n_critic_updates": 3}], ids=str)
def test_chunks_of_environments_give_the_same_update(keywords, monkeypatch):
    whole = recurrent_model(policy_kwargs=SGD, **keywords).learn(100)
    monkeypatch.setattr(VPGBufferMixin, "chunk_size", 1)
    chunks = recurrent_model(policy_kwargs=SGD, **keywords).learn(100)
    for name, values in weights(chunks).items():
        np.testing.assert_allclose(values, weights(whole)[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_minibatches_of_the_critic_are_whole_environments():
    model = recurrent_model(critic_batch_size=10, n_critic_updates=3).learn(72)
    batches = list(model.recorder.get(10))
    assert len(batches) == 3
    for batch in batches:
        assert len(batch.inputs["env_indices"].unique()) == 1


# ---------------------------------------------------------------------------------------------------------------
# The fast runner
# ---------------------------------------------------------------------------------------------------------------


SPACES = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(-1, 1, (2,)),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(2),
}
POLICIES = {
    **{f"critic: {name}": {"critic": critic} for name, critic in CRITICS.items()},
    **{name: {"env": lambda space=space: walks(action_space=space)} for name, space in SPACES.items()},
    "gSDE": {"env": lambda: walks(action_space=FORCE), "use_sde": True},
    "dict": {"env": lambda: walks(spaces.Dict({"a": VECTOR, "b": FORCE})), "policy": "MultiInputLstmPolicy"},
    "CNN": {"env": lambda: walks(IMAGE), "policy": "CnnLstmPolicy"},
    "own features": {"critic": {"share_features_extractor": False}},
    "ReLU": {"critic": {"activation_fn": th.nn.ReLU}},
}


def runners_of(name):
    """The model, with the general runner and the fast one, whose rollout began in the middle of episodes."""
    keywords = dict(POLICIES[name])
    model = recurrent_model(keywords.pop("env", walks)(), **keywords).learn(72)
    fast = model._make_runner()
    assert isinstance(fast, FastRecurrentRunner)
    assert model.recorder.first_steps.any()
    return model, RecurrentRunner(model.policy, model._first_states), fast


@pytest.mark.parametrize("name", POLICIES)
def test_the_fast_runner_takes_the_steps_of_the_policy(name):
    model, _, fast = runners_of(name)
    policy, obs = model.policy, model.policy.obs_to_tensor(model._last_obs)[0]
    states, starts = model._lstm_states, th.tensor([0.0, 1.0, 0.0])
    for _ in range(3):
        with th.no_grad():
            # As a callback changes them that loads parameters
            for parameter in policy.parameters():
                parameter += 0.01
        th.manual_seed(1)
        with th.no_grad():
            expected, expected_values, _, expected_states = policy(obs, states, starts)
        th.manual_seed(1)
        actions, values, states = fast.sample(obs, states, starts, with_values=True)
        np.testing.assert_allclose(actions.reshape(expected.shape), expected, atol=1e-5)
        th.testing.assert_close(values, expected_values.flatten(), rtol=1e-4, atol=1e-5)
        kinds = ("pi", "vf") if policy.lstm_critic is not None or policy.shared_lstm else ("pi",)
        for kind in kinds:
            th.testing.assert_close(getattr(states, kind), getattr(expected_states, kind), rtol=1e-4, atol=1e-5)
        th.manual_seed(1)
        without_values, values, _ = fast.sample(obs, model._lstm_states, starts, with_values=False)
        assert without_values.shape == actions.shape
        assert values is None


@pytest.mark.parametrize("name", POLICIES)
def test_the_fast_runner_evaluates_as_the_policy_does(name):
    model, general, fast = runners_of(name)
    (batch,) = model.recorder.get(shuffle=False)
    found = []
    for runner in (general, fast):
        model.policy.zero_grad()
        values, log_prob, entropy = runner.evaluate(batch.observations, batch.actions, True, **batch.inputs)
        (values.sum() + 2 * log_prob.sum() + (0 if entropy is None else 3 * entropy.sum())).backward()
        gradients = [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]
        alone = runner.values(batch.observations, **batch.inputs)
        found.append([values, log_prob, *([] if entropy is None else [entropy]), alone, *gradients])
    assert len(found[0]) == len(found[1])
    for expected, numbers in zip(*found):
        th.testing.assert_close(numbers, expected, rtol=1e-3, atol=1e-4)


def sequences_of(lengths, n_steps):
    """:return: the inputs of a runner: environments whose episodes have these lengths"""
    starts = th.stack([(th.arange(n_steps) % length == 0).float() for length in lengths])
    return {"env_indices": th.arange(len(lengths)).repeat_interleave(n_steps), "episode_starts": starts.flatten()}


def test_one_long_episode_does_not_make_all_sequences_long():
    model = recurrent_model(walks(n_envs=8), n_steps=64).learn(512)
    groups = RecurrentRunner(model.policy, model._first_states)._groups(**sequences_of([64, *[5] * 7], 64))
    assert sorted(th.cat([group.steps for group in groups]).tolist()) == list(range(512))
    # 92 sequences: one of 64 steps, 84 of 5, seven of 4
    assert sum(group.n_places for group in groups) <= 2 * 512


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], []),
        ([9, 9, 8, 7, 7, 7, 6, 6], []),
        # 46 instead of 60 padded steps, and each further cut would save less than a third
        ([20, 13, 13], []),
        ([20, 6, 6], [1]),
        ([64, *[5] * 84], [1]),
        ([100, 90, 10, 10, 9, 1, 1, 1, 1], [2, 5]),
    ],
)
def test_sequences_are_cut_into_groups_where_much_padding_is_saved(lengths, expected):
    assert cuts(np.array(lengths)) == expected


def test_batch_normalization_sees_all_sequences_and_hardly_their_padding():
    kwargs = {**SMALL, "features_extractor_class": Normalized}
    model = recurrent_model(walks(n_envs=8), n_steps=64, policy_kwargs=kwargs).learn(512)
    inputs = sequences_of([64, *[3] * 7], 64)
    obs = th.randn((512, *VECTOR.shape), generator=th.Generator().manual_seed(0))
    statistics = []
    for runner in (RecurrentRunner, FastRecurrentRunner):
        policy = copy.deepcopy(model.policy)
        policy.set_training_mode(True)
        policy.features_extractor.norm.reset_running_stats()
        runner(policy, model._first_states).values(obs, **inputs)
        statistics.append(policy.features_extractor.norm.running_mean)
    # Only the general runner pads them
    th.testing.assert_close(statistics[0], statistics[1], rtol=0, atol=0.003)


@pytest.mark.parametrize("n_steps", [36, 15])
def test_the_logged_kl_divergence_is_exact(n_steps, monkeypatch):
    """Of the first steps, in order of environment and time, if the rollout has many."""
    monkeypatch.setattr("sb3_vpg.vpg.KL_STEPS", n_steps)
    before = []
    spy = Spy(lambda spy: before.append(copy.deepcopy(spy.model.policy)), "rollout_end")
    model = recurrent_model(learning_rate=0.05, n_critic_updates=1).learn(36, callback=spy, log_interval=100)
    (batch,) = model.recorder.get(shuffle=False)

    def log_p(policy):
        """Of all actions, by the policy's own methods."""
        runner = RecurrentRunner(policy, model._first_states)
        actions = [th.full_like(batch.actions, action) for action in range(3)]
        with th.no_grad():
            return th.stack([runner.evaluate(batch.observations, action, False, **batch.inputs)[1] for action in actions])

    old, new = log_p(before[0]), log_p(model.policy)
    expected = (old.exp() * (old - new)).sum(dim=0)[:n_steps].mean().item()
    assert expected > 1e-3
    assert model.logger.name_to_value["train/kl_divergence"] == pytest.approx(expected, rel=1e-3)


class OwnForward(RecurrentActorCriticPolicy):
    def forward(self, *args, **kwargs):
        actions, values, log_prob, states = super().forward(*args, **kwargs)
        return actions, values + 100, log_prob, states


@pytest.mark.parametrize(
    "change",
    {
        "own forward": lambda policy: setattr(policy, "__class__", OwnForward),
        "hook of the LSTM": lambda policy: policy.lstm_actor.register_forward_hook(lambda *_: None),
        "hook of the policy": lambda policy: policy.register_forward_hook(lambda *_: None),
        "replaced method": lambda policy: setattr(policy, "_process_sequence", policy._process_sequence),
        "double precision": lambda policy: policy.lstm_critic.double(),
    }.values(),
)
def test_other_policies_are_called_themselves(change):
    policy = recurrent_model().policy
    change(policy)
    assert not has_contrib_forward(policy)


@pytest.mark.parametrize("lstm_kwargs", [{"bias": False}, {"batch_first": True}])
def test_lstms_with_other_options_are_called_themselves(lstm_kwargs):
    assert not has_contrib_forward(recurrent_model(critic={"lstm_kwargs": lstm_kwargs}).policy)


def test_the_values_of_an_own_forward_are_used():
    model = recurrent_model(policy=OwnForward).learn(36)
    assert model.recorder.values.min() > 50


# ---------------------------------------------------------------------------------------------------------------
# Use
# ---------------------------------------------------------------------------------------------------------------


class Recall(gym.Env):
    """The first observation tells which action is right in the fourth step. Nothing else does."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.right = 0, int(self.np_random.integers(2))
        return np.array([2.0 * self.right - 1], dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        done = self.t == 4
        return np.zeros(1, dtype=np.float32), float(done and action == self.right), done, False, {}


@pytest.mark.slow
def test_it_learns_what_needs_memory():
    keywords = {"n_steps": 32, "learning_rate": 0.01, "gamma": 1.0, "seed": 0}
    model = RecurrentVPG("MlpLstmPolicy", make_vec_env(Recall, 8), policy_kwargs={"lstm_hidden_size": 16}, **keywords)
    assert evaluate_policy(model.learn(12_000), make_vec_env(Recall, 1, seed=5), n_eval_episodes=50)[0] > 0.95


def test_a_resumed_run_gives_the_same_weights(tmp_path):
    whole = recurrent_model(make_vec_env("CartPole-v1", 2, seed=0)).learn(144)
    env = make_vec_env("CartPole-v1", 2, seed=0)
    half = recurrent_model(env).learn(72)
    half.save(tmp_path / "half")
    resumed = RecurrentVPG.load(tmp_path / "half")
    # The environments go on where they are, in the middle of episodes
    resumed.env, resumed.n_envs = half.env, 2
    resumed._last_obs, resumed._last_episode_starts = half._last_obs, half._last_episode_starts
    assert_same_weights(resumed.learn(72, reset_num_timesteps=False), whole)


def test_states_are_saved_for_machines_without_their_device():
    class Part:
        def to(self, device):
            return device

    states = States((Part(), Part()), (Part(), Part()))
    cpu = th.device("cpu")
    assert pickle.loads(pickle.dumps(states)) == States((cpu, cpu), (cpu, cpu))


def test_normalized_environments_and_prediction(tmp_path):
    env = VecNormalize(walks())
    model = recurrent_model(env).learn(72)
    model.save(tmp_path / "model")
    loaded = RecurrentVPG.load(tmp_path / "model", env=env)
    obs, state, starts = env.reset(), None, np.ones(3, dtype=bool)
    for _ in range(10):
        actions, new_state = loaded.predict(obs, state, starts, deterministic=True)
        expected, expected_state = model.policy.predict(obs, state, starts, deterministic=True)
        np.testing.assert_array_equal(actions, expected)
        np.testing.assert_array_equal(new_state, expected_state)
        state = new_state
        obs, _, starts, _ = env.step(actions)
    loaded.learn(36)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"policy": VPG.policy_aliases["MlpPolicy"]}, "a subclass of RecurrentActorCriticPolicy"),
        ({"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class=RolloutBuffer is not allowed with a recurrent policy"),
    ],
)
def test_what_cannot_be_recurrent_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        RecurrentVPG(**{"policy": "MlpLstmPolicy", "env": walks(), **keywords})


def test_an_observation_that_was_wrong_once_does_not_stay_in_the_memory():
    class Logarithm(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 3)

        def forward(self, observations):
            return observations.log()

    class Prices(RandomWalk):
        price = 2.0

        def _obs(self):
            super()._obs()
            return np.full(3, self.price, dtype=np.float32)

    env = DummyVecEnv([lambda: Prices(spaces.Box(0.5, 9.0, (3,)), spaces.Discrete(3))] * 2)
    for policy_class in ("MlpLstmPolicy", type("Own", (RecurrentActorCriticPolicy,), {"forward": overridden})):
        model = recurrent_model(env, policy_class, {"features_extractor_class": Logarithm}).learn(24)
        Prices.price = -1.0
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"Non-finite value|invalid values"):
            model.learn(48)
        Prices.price = 2.0
        model.learn(24)


def overridden(self, *args, **kwargs):
    return RecurrentActorCriticPolicy.forward(self, *args, **kwargs)
