"""MaskableVPG: sb3-contrib's MaskablePPO is the oracle, and a masked action must have no part in anything."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from helpers.models import SMALL, Spy, assert_same_weights, weights
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from test_vpg_is_a2c import IMAGE, VECTOR, RandomWalk

from sb3_vpg import VPG, MaskableVPG, RecurrentVPG
from sb3_vpg.common.policy_runner import FastPolicyRunner, PolicyRunner, make_policy_runner
from sb3_vpg.diagnostics import UpdateSpec, gradient_statistics
from sb3_vpg.envs import NativeVecEnv
from sb3_vpg.estimators import Formulation

ACTIONS = {
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(2),
}
each_space = pytest.mark.parametrize("action_space", ACTIONS.values(), ids=ACTIONS)
FAST = (False, True)


def sizes_of(action_space):
    return {"Discrete": [4], "MultiDiscrete": [2, 3], "MultiBinary": [2, 2]}[type(action_space).__name__]


def draw_mask(rng, sizes):
    """A mask that allows at least one value of each dimension."""
    parts = [(rng.random(size) < 0.5) | (np.arange(size) == rng.integers(size)) for size in sizes]
    return np.concatenate(parts)


class MaskedWalk(RandomWalk):
    """Random walk whose masks change at each step. An action that is not allowed is an error."""

    def __init__(self, action_space=ACTIONS["Discrete"], observation_space=VECTOR):
        super().__init__(observation_space, action_space)
        self.sizes = sizes_of(action_space)

    def action_masks(self):
        return self.mask

    def _obs(self):
        self.mask = draw_mask(self.np_random, self.sizes)
        return super()._obs()

    def step(self, action):
        places = np.cumsum([0, *self.sizes[:-1]]) + np.ravel(action)
        assert self.action_masks()[places].all()
        return super().step(action)


def masked_envs(action_space=ACTIONS["Discrete"], observation_space=VECTOR, n_envs=2, seed=1):
    env = DummyVecEnv([lambda: MaskedWalk(action_space, observation_space)] * n_envs)
    env.seed(seed)
    return env


def masked_model(env=None, policy="MlpPolicy", **keywords):
    env = masked_envs() if env is None else env
    return MaskableVPG(policy, env, **{"n_steps": 10, "seed": 0, "policy_kwargs": SMALL, **keywords})


def batch_of(action_space, n=50):
    """Observations, actions that are allowed, masks."""
    rng = np.random.default_rng(0)
    masks = np.array([draw_mask(rng, sizes_of(action_space)) for _ in range(n)])
    parts = np.split(masks, np.cumsum(sizes_of(action_space))[:-1], axis=1)
    actions = np.stack([[rng.choice(np.flatnonzero(row)) for row in part] for part in parts], axis=1)
    return th.as_tensor(rng.normal(size=(n, 3)), dtype=th.float32), th.as_tensor(actions, dtype=th.float32), masks


# ---------------------------------------------------------------------------------------------------------------
# The same as MaskablePPO with one epoch
# ---------------------------------------------------------------------------------------------------------------

SGD = {"net_arch": [16], "optimizer_class": th.optim.SGD}
CASES = {
    **{name: ("MlpPolicy", VECTOR, space, {}) for name, space in ACTIONS.items()},
    "entropy bonus": ("MlpPolicy", VECTOR, ACTIONS["Discrete"], {"ent_coef": 0.5}),
    "normalize_advantage": ("MlpPolicy", VECTOR, ACTIONS["MultiDiscrete"], {"normalize_advantage": True}),
    "dict": ("MultiInputPolicy", spaces.Dict({"a": VECTOR, "b": VECTOR}), ACTIONS["Discrete"], {}),
    "CNN": (
        "CnnPolicy",
        IMAGE,
        ACTIONS["Discrete"],
        {"policy_kwargs": {**SGD, "features_extractor_kwargs": {"features_dim": 16}}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_maskable_ppo_with_one_epoch(case):
    policy, observation_space, action_space, keywords = CASES[case]
    common = {"n_steps": 12, "gamma": 0.9, "gae_lambda": 1.0, "learning_rate": 0.01, "normalize_advantage": False, "seed": 3}
    common |= {"policy_kwargs": SGD, "device": "cpu", **keywords}
    own = {"n_critic_updates": 1, "max_grad_norm": None}
    ppo = {"n_epochs": 1, "batch_size": 24, "max_grad_norm": 1e9}
    models = [
        algorithm(policy, masked_envs(action_space, observation_space), **common, **further).learn(240)
        for algorithm, further in ((MaskableVPG, own), (MaskablePPO, ppo))
    ]
    first, second = (weights(model) for model in models)
    start = weights(MaskableVPG(policy, masked_envs(action_space, observation_space), **common, **own))
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert not np.array_equal(values, start[name]), name


# ---------------------------------------------------------------------------------------------------------------
# Distributions
# ---------------------------------------------------------------------------------------------------------------


def runners(policy):
    fast = make_policy_runner(policy)
    assert isinstance(fast, FastPolicyRunner)
    return {False: PolicyRunner(policy), True: fast}


@pytest.mark.parametrize("masked", [True, False])
@each_space
def test_sampled_actions_are_those_of_the_policy_from_the_same_random_state(action_space, masked):
    policy = masked_model(masked_envs(action_space)).policy
    obs, _, masks = batch_of(action_space)
    inputs = {"action_masks": masks} if masked else {}
    th.manual_seed(1)
    actions, values = runners(policy)[True].sample(obs, with_values=False, **inputs)
    th.manual_seed(1)
    with th.no_grad():
        expected = policy.get_distribution(obs, **inputs).get_actions().numpy()
    assert values is None
    np.testing.assert_array_equal(actions.reshape(expected.shape), expected)


def test_a_distribution_of_the_users_own_is_masked_too():
    class OwnDistribution(MaskableCategoricalDistribution):
        pass

    model = masked_model()
    model.policy.action_dist = OwnDistribution(4)
    model.learn(40)
    assert isinstance(make_policy_runner(model.policy), FastPolicyRunner)
    for name, values in weights(masked_model().learn(40)).items():
        np.testing.assert_allclose(weights(model)[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("masked", [True, False])
@each_space
def test_evaluations_and_their_gradients_are_those_of_the_policy(action_space, masked):
    policy = masked_model(masked_envs(action_space)).policy
    obs, actions, masks = batch_of(action_space)
    inputs = {"action_masks": th.as_tensor(masks)} if masked else {}
    found = {}
    for fast, runner in runners(policy).items():
        policy.zero_grad()
        values, log_prob, entropy = runner.evaluate(obs, actions, True, **inputs)
        (values.sum() + 2 * log_prob.sum() + 3 * entropy.sum()).backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        found[fast] = [values, log_prob, entropy, *gradients.values()]
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    for numbers, expected in zip(found[True], found[False]):
        th.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)


@each_space
def test_the_kl_divergence_is_that_of_the_allowed_actions(action_space):
    model = masked_model(masked_envs(action_space))
    obs, actions, masks = batch_of(action_space)
    inputs = {"action_masks": th.as_tensor(masks)}
    runner = make_policy_runner(model.policy)

    def probabilities():
        """Of each dimension of an action, by hand, over what is allowed."""
        with th.no_grad():
            logits = model.policy.action_net(model.policy.mlp_extractor.forward_actor(obs)).double().numpy()
        parts = np.split(np.where(masks, np.exp(logits), 0.0), np.cumsum(sizes_of(action_space))[:-1], axis=1)
        return [part / part.sum(axis=1, keepdims=True) for part in parts]

    before, p_before = runner.snapshot(obs, actions, **inputs), probabilities()
    with th.no_grad():
        model.policy.action_net.weight += th.randn_like(model.policy.action_net.weight)
    expected = sum(
        np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), axis=1) for p, q in zip(p_before, probabilities())
    )
    kl = runner.kl_divergence(before, runner.snapshot(obs, actions, **inputs))
    assert kl == pytest.approx(expected.mean(), rel=1e-4)
    assert kl > 0.01


def test_the_logged_kl_divergence_is_that_of_the_masked_distributions():
    before = []
    spy = Spy(lambda spy: before.append(copy.deepcopy(spy.model.policy)), "rollout_end")
    model = masked_model(learning_rate=0.1, normalize_advantage=False).learn(20, callback=spy, log_interval=100)
    (batch,) = model.recorder.get()
    old, new = make_policy_runner(before[0]), make_policy_runner(model.policy)
    snapshots = [runner.snapshot(batch.observations, batch.actions, **batch.inputs) for runner in (old, new)]
    assert model.logger.name_to_value["train/kl_divergence"] == pytest.approx(new.kl_divergence(*snapshots), rel=1e-4)
    without_masks = [runner.snapshot(batch.observations, batch.actions) for runner in (old, new)]
    assert new.kl_divergence(*without_masks) != pytest.approx(new.kl_divergence(*snapshots), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"estimator": "total_return", "baseline": "leave_one_out"},
        {"estimator": "reward_to_go", "n_episodes": 2},
        {"estimator": "td_residual", "critic_batch_size": 7},
        {"rollout_buffer_class": MaskableRolloutBuffer},
    ],
    ids=str,
)
@each_space
def test_masks_are_stored_with_the_steps_at_which_they_held(action_space, keywords):
    # The environment refuses actions that are not allowed
    model = masked_model(masked_envs(action_space), **keywords).learn(100)
    (batch,) = model.recorder.get_normalized(None)
    masks = getattr(batch, "inputs", {"action_masks": getattr(batch, "action_masks", None)})["action_masks"].numpy()
    places = np.cumsum([0, *sizes_of(action_space)[:-1]]) + batch.actions.numpy().astype(int).reshape(len(masks), -1)
    assert np.take_along_axis(masks, places, axis=1).all()
    assert 0.5 < masks.mean() < 0.9


def test_the_masks_are_those_of_the_observations():
    class Telling(MaskedWalk):
        """The observation is the mask."""

        def _obs(self):
            super()._obs()
            return self.mask[:3].astype(np.float32)

    model = masked_model(DummyVecEnv([Telling] * 3), estimator="reward_to_go").learn(60)
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.inputs["action_masks"][:, :, :3], buffer.observations)
    # Rollouts of whole episodes are longer than what was allocated first
    assert len(buffer.observations) > 10


@pytest.mark.parametrize("cls", [DummyVecEnv, SubprocVecEnv])
def test_without_masking_no_mask_is_asked_for(cls):
    model = masked_model(cls([lambda: RandomWalk(VECTOR, ACTIONS["Discrete"])] * 2))
    model.learn(40, use_masking=False)
    assert model.rollout_buffer.inputs == {}
    with pytest.raises(
        ValueError, match=r"has no method action_masks\(\): add it, or a wrapper .*ActionMasker .*learn\(use_masking=False"
    ):
        model.learn(40)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([False] * 4, r"action_masks\(\) of environment 1 allows no action"),
        ([True] * 3, "action_masks.. of environment 1 has 3 entries; .*Discrete.* needs 4"),
        (None, "action_masks.. of environment 1 returned None; .*Discrete.* needs 4 booleans"),
        ([], r"action_masks.. of environment 1 returned \[\]; .* needs 4 booleans"),
        (np.array(True), r"action_masks.. of environment 1 returned array\(True\); .* needs 4 booleans"),
    ],
)
def test_a_mask_that_cannot_be_is_an_error(mask, message):
    class Bad(MaskedWalk):
        def action_masks(self):
            return mask if self.t == 4 else np.array([True] * 4)

    class Good(MaskedWalk):
        def action_masks(self):
            return np.array([True] * 4)

    model = masked_model(DummyVecEnv([Good, Bad]))
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.learn(40)
    assert all(np.array_equal(values, before[name]) for name, values in weights(model).items())


def test_a_mask_may_be_a_list_for_each_dimension():
    class Lists(MaskedWalk):
        def action_masks(self):
            return [mask.tolist() for mask in np.split(self.mask, [2])]

        def step(self, action):
            assert all(part[value] for part, value in zip(self.action_masks(), action))
            return RandomWalk.step(self, action)

    masked_model(DummyVecEnv([lambda: Lists(ACTIONS["MultiDiscrete"])] * 2)).learn(40)


class LosesMask(MaskedWalk):
    def action_masks(self):
        if self.t == 4:
            raise KeyError("no list of moves")
        return super().action_masks()


@pytest.mark.parametrize("cls", [DummyVecEnv, SubprocVecEnv])
def test_masks_that_raise_are_the_error_of_the_environment(cls):
    model = masked_model(cls([MaskedWalk, LosesMask]))
    with pytest.raises(RuntimeError, match=r"nvironment.* failed.*(no list of moves|process exited)"):
        model.learn(40)


def test_a_dimension_without_an_allowed_value_is_an_error():
    class Bad(MaskedWalk):
        def action_masks(self):
            return np.array([True, True, False, False, False])

    with pytest.raises(ValueError, match="environment 0 allows no action"):
        masked_model(DummyVecEnv([lambda: Bad(ACTIONS["MultiDiscrete"])])).learn(10)


# ---------------------------------------------------------------------------------------------------------------
# sb3-contrib's conventions
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_where_most_actions_are_not_allowed(tmp_path):
    env, other = (Monitor(InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)) for _ in range(2))
    evaluation = MaskableEvalCallback(other, eval_freq=1000)
    model = MaskableVPG("MlpPolicy", env, n_steps=64, gamma=0.4, seed=1).learn(4000, callback=evaluation)
    assert evaluate_policy(model, env, n_eval_episodes=5)[0] > 90
    assert evaluation.last_mean_reward > 50
    model.save(tmp_path / "model")
    loaded = MaskableVPG.load(tmp_path / "model", env=env)
    assert_same_weights(model, loaded)
    obs, _ = env.reset()
    for _ in range(20):
        action, state = loaded.predict(obs, action_masks=get_action_masks(env))
        assert get_action_masks(env)[action]
        assert state is None


def test_a_resumed_run_gives_the_same_weights(tmp_path):
    # Rollouts of whole episodes begin with a reset
    keywords = {"estimator": "reward_to_go", "n_episodes": 2}
    whole = masked_model(**keywords).learn(120)
    half = masked_model(**keywords).learn(40)
    half.save(tmp_path / "half")
    resumed = MaskableVPG.load(tmp_path / "half", env=masked_envs(seed=7))
    assert_same_weights(resumed.learn(120 - half.num_timesteps, reset_num_timesteps=False), whole)
    assert resumed.num_timesteps == whole.num_timesteps


@pytest.mark.parametrize("cls", [DummyVecEnv, SubprocVecEnv])
def test_wrapped_environments_give_masks(cls):
    def make():
        return ActionMasker(RandomWalk(VECTOR, ACTIONS["Discrete"]), lambda env: np.array([True, False, True, True]))

    env = VecNormalize(cls([make] * 2))
    model = masked_model(env).learn(40)
    assert not (model.rollout_buffer.actions == 1).any()
    env.close()


def test_a_vectorized_environment_gives_all_masks_in_one_call():
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    class MaskedVectorEnv(SyncVectorEnv):
        def action_masks(self):
            return np.array([env.get_wrapper_attr("action_masks")() for env in self.envs])

    vector_env = MaskedVectorEnv([MaskedWalk] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    env = NativeVecEnv(vector_env)
    masked_model(env).learn(60)
    MaskablePPO("MlpPolicy", env, n_steps=10, batch_size=30).learn(60)
    assert np.shape(env.env_method("action_masks", indices=[0, 2])) == (2, 4)


class Board(VectorEnv):
    """Three cells to fill. A full board has no move left, and is emptied in the next step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    observation_space, action_space = spaces.Box(0, 1, (2, 3)), spaces.MultiDiscrete([3, 3])
    single_observation_space, single_action_space = spaces.Box(0, 1, (3,)), spaces.Discrete(3)
    num_envs = 2

    def action_masks(self):
        return ~self.full

    def reset(self, *, seed=None, options=None):
        self.full = np.zeros((2, 3), dtype=bool)
        return self.full.astype(np.float32), {}

    def step(self, actions):
        due = self.full.all(axis=1)
        assert due.all() or not self.full[[0, 1], actions].any()
        self.full[[0, 1], actions] = True
        self.full[due] = False
        return self.full.astype(np.float32), np.where(due, 0.0, 1.0), self.full.all(axis=1), np.zeros(2, dtype=bool), {}


def test_the_step_of_a_reset_needs_no_allowed_action():
    masked_model(NativeVecEnv(Board())).learn(60)


@pytest.mark.parametrize("algorithm", ["PPO", "VPG", "VPG, trained"])
def test_gradient_statistics_use_the_masks(algorithm):
    if algorithm == "PPO":
        model = MaskablePPO("MlpPolicy", masked_envs(), n_steps=8, batch_size=16, device="cpu").learn(16)
    else:
        model = masked_model() if algorithm == "VPG" else masked_model().learn(20)
    spec = UpdateSpec(Formulation("reward_to_go"), episodes_per_batch=4)
    # The environments refuse actions that are not allowed
    statistics = gradient_statistics(model, masked_envs(seed=5), {"to go": spec}, n_episodes=16, n_bootstrap=10)
    assert np.isfinite(statistics["to go"].variance.value)


# ---------------------------------------------------------------------------------------------------------------
# Construction
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action_space", "keywords", "message"),
    [
        # SB3's own check
        (spaces.Box(-1, 1, (2,)), {}, "The algorithm only supports .*Discrete.* as action spaces but Box"),
        (ACTIONS["Discrete"], {"use_sde": True}, "gSDE. can only be used with continuous actions"),
        (ACTIONS["Discrete"], {"policy": VPG.policy_aliases["MlpPolicy"]}, "a subclass of MaskableActorCriticPolicy"),
        (spaces.MultiBinary([2, 2]), {}, "cannot be masked; allowed: Discrete, and MultiDiscrete or MultiBinary"),
        (spaces.MultiDiscrete([[2, 3], [2, 2]]), {}, "cannot be masked; allowed: Discrete, and MultiDiscrete or MultiBinary"),
        (ACTIONS["Discrete"], {"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class=RolloutBuffer is not allowed"),
    ],
    ids=["box", "gSDE", "policy", "two dimensions", "two dimensions of values", "buffer without masks"],
)
def test_what_cannot_be_masked_is_refused(action_space, keywords, message):
    env = DummyVecEnv([lambda: RandomWalk(VECTOR, action_space)])
    with pytest.raises((ValueError, AssertionError), match=message):
        MaskableVPG(**{"policy": "MlpPolicy", "env": env, **keywords})


def test_the_models_of_other_classes_are_refused_by_name(tmp_path):
    masked_model().save(tmp_path / "masked")
    with pytest.raises(ValueError, match="policy=MaskableActorCriticPolicy is not allowed with VPG; allowed: MaskableVPG"):
        VPG.load(tmp_path / "masked")
    RecurrentVPG("MlpLstmPolicy", "CartPole-v1").save(tmp_path / "recurrent")
    with pytest.raises(ValueError, match="policy=RecurrentActorCriticPolicy is not allowed with VPG; allowed: RecurrentVPG"):
        VPG.load(tmp_path / "recurrent")
