"""The fast passes through a policy's networks must give the numbers of SB3's own methods."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, BOX
from helpers.models import spaces_envs
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, MlpExtractor
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn.utils import parametrizations, parametrize, prune

from sb3_vpg import VPG, LogisticPolicy, TanhMeanPolicy
from sb3_vpg.common.policy_runner import LARGEST_NUMPY_PRODUCT, FastPolicyRunner, PolicyRunner, make_policy_runner

DISCRETE = ACTION_SPACES["Discrete"]


class OwnNetwork(MlpExtractor):
    """Not known to the passes, hence called as a whole."""

    def forward_actor(self, features):
        return 0.5 * super().forward_actor(features)


class OwnNetworkPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = OwnNetwork(self.features_dim, self.net_arch, self.activation_fn, self.device)


class OwnFeatures(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=8)
        self.linear = nn.Linear(3, 8)

    def forward(self, observations):
        return self.linear(observations).relu()


def counting_hook(policy):
    policy.calls = []
    policy.action_net.register_forward_hook(lambda *_: policy.calls.append(1))
    return policy


def squared_hook(policy):
    """A hook that changes what its layer gives."""
    policy.mlp_extractor.policy_net[0].register_forward_hook(lambda module, args, output: output**2)
    return policy


def hook_of_all_layers(policy):
    policy.mlp_extractor.policy_net.register_forward_hook(lambda module, args, output: output**2)
    return policy


def frozen(policy):
    policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
    return policy


def without_bias(policy):
    policy.mlp_extractor.policy_net[0] = nn.Linear(3, 64, bias=False)
    policy.action_net = nn.Linear(64, 4, bias=False)
    return policy


def spectral_norm(policy):
    parametrizations.spectral_norm(policy.mlp_extractor.policy_net[2])
    return policy


def weight_norm(policy):
    parametrizations.weight_norm(policy.mlp_extractor.policy_net[2])
    parametrizations.weight_norm(policy.value_net)
    return policy


def pruned(policy):
    prune.l1_unstructured(policy.mlp_extractor.policy_net[0], "weight", amount=0.5)
    return policy


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized_noise(policy):
    parametrize.register_parametrization(policy, "log_std", Doubled())
    return policy


def other_layers(policy):
    """Neither network can be gone through layer by layer."""
    policy.mlp_extractor.policy_net = nn.Linear(3, 64)
    policy.mlp_extractor.value_net = Doubled()
    policy.value_net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return policy


def own_forward_of_a_layer(policy):
    layer = policy.mlp_extractor.policy_net[0]
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return policy


def own_forward_of_an_activation(policy):
    policy.mlp_extractor.policy_net[1].forward = lambda x: x.sigmoid()
    return policy


def more_than_flattened(policy):
    for extractor in {policy.pi_features_extractor, policy.vf_features_extractor}:
        extractor.flatten = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    return policy


POLICIES = {
    **{
        name: lambda space=space, **kw: ActorCriticPolicy(BOX, space, lambda _: 0.1, **kw)
        for name, space in ACTION_SPACES.items()
    },
    "gSDE": lambda **kw: ActorCriticPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1, use_sde=True, **kw),
    "squashed gSDE": lambda **kw: ActorCriticPolicy(
        BOX, ACTION_SPACES["Box"], lambda _: 0.1, use_sde=True, squash_output=True, **kw
    ),
    "logistic": lambda **kw: LogisticPolicy(BOX, spaces.Discrete(2), lambda _: 0.1, **kw),
    "tanh mean": lambda **kw: TanhMeanPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1, **kw),
    "tanh mean, gSDE": lambda **kw: TanhMeanPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1, use_sde=True, **kw),
    "own network": lambda **kw: OwnNetworkPolicy(BOX, DISCRETE, lambda _: 0.1, **kw),
    "own features": lambda **kw: ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, features_extractor_class=OwnFeatures, **kw),
    "no layers": lambda **kw: ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, net_arch=[], **kw),
    "ReLU": lambda **kw: ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, activation_fn=nn.ReLU, **kw),
    "wide": lambda **kw: ActorCriticPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1, net_arch=[512, 8], **kw),
    "observed": lambda **kw: counting_hook(ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)),
    "changed by a hook": lambda **kw: squared_hook(ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)),
    "changed as a whole": lambda **kw: hook_of_all_layers(ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)),
    "frozen": lambda **kw: frozen(ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)),
    "without bias": lambda **kw: without_bias(ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)),
    "parametrized noise": lambda **kw: parametrized_noise(ActorCriticPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1, **kw)),
    **{
        changed.__name__.replace("_", " "): lambda changed=changed, **kw: changed(
            ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1, **kw)
        )
        for changed in (
            spectral_norm,
            weight_norm,
            pruned,
            other_layers,
            own_forward_of_a_layer,
            own_forward_of_an_activation,
            more_than_flattened,
        )
    },
}
# Few observations go through NumPy, many through PyTorch
FEW, MANY = 5, 200


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def share(request):
    return request.param


@pytest.fixture(params=POLICIES)
def policy(request, share):
    policy = POLICIES[request.param](share_features_extractor=share)
    policy.set_training_mode(False)
    # Far from the first weights, so that actions differ from state to state
    th.manual_seed(0)
    with th.no_grad():
        for p in policy.parameters():
            p += 0.5 * th.randn_like(p)
    if policy.use_sde:
        policy.reset_noise(MANY)
    return policy


def observations(n):
    return th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (n, 3)).astype(np.float32))


def stored_actions(policy, n):
    """As the rollout buffer keeps them."""
    th.manual_seed(1)
    with th.no_grad():
        actions = policy.get_distribution(observations(n)).get_actions()
    return actions.reshape(n, -1).to(th.float32)


@pytest.mark.parametrize("n", [FEW, MANY])
def test_actions_are_those_of_the_distribution_from_the_same_random_state(policy, n):
    if policy.use_sde:
        policy.reset_noise(n)
    x = observations(n)
    th.manual_seed(3)
    with th.no_grad():
        expected = policy.get_distribution(x).get_actions()
    state = th.get_rng_state()
    th.manual_seed(3)
    actions, values = make_policy_runner(policy).sample(x, with_values=False)
    assert values is None
    assert isinstance(actions, np.ndarray)
    assert th.equal(th.get_rng_state(), state)
    np.testing.assert_allclose(actions, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert n == FEW or len(np.unique(actions)) > 1


@pytest.mark.parametrize("n", [FEW, MANY])
def test_values_can_be_had_with_the_actions(policy, n):
    if policy.use_sde:
        policy.reset_noise(n)
    x = observations(n)
    with th.no_grad():
        expected = policy.predict_values(x).flatten()
    _, values = make_policy_runner(policy).sample(x, with_values=True)
    th.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    with th.no_grad():
        th.testing.assert_close(make_policy_runner(policy).values(x), expected, rtol=1e-4, atol=1e-5)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("with_values", [True, False])
def test_an_evaluation_and_its_gradients_are_those_of_the_policys_own(policy, with_values):
    x, actions = observations(MANY), stored_actions(policy, MANY)
    weights = th.as_tensor(np.random.default_rng(1).normal(size=(3, MANY)).astype(np.float32))

    def evaluated(passes):
        values, log_prob, entropy = passes.evaluate(x, actions, with_values)
        assert log_prob.shape == (MANY,)
        loss = (weights[0] * log_prob).mean()
        if entropy is not None:
            loss = loss + (weights[1] * entropy).mean()
        assert (values is not None) == with_values
        if values is not None:
            loss = loss + (weights[2] * values**2).mean()
        return [values, log_prob, entropy], gradients(policy, loss)

    expected, expected_gradients = evaluated(PolicyRunner(policy))
    fast, fast_gradients = evaluated(make_policy_runner(policy))
    for theirs, ours in zip(expected, fast):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, theirs in expected_gradients.items():
        ours = fast_gradients[name]
        if theirs is None:
            assert ours is None, name
        elif ours is None:
            # Not asked for, hence not part of the graph
            assert not with_values
            assert not theirs.any(), name
        else:
            th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_kl_divergence_is_that_of_the_distributions(policy):
    x, actions = observations(MANY), stored_actions(policy, MANY)
    passes = make_policy_runner(policy)

    def distribution():
        with th.no_grad():
            return policy.get_distribution(x).distribution

    def own_kl(before, after):
        if isinstance(before, list):
            return sum(th.distributions.kl_divergence(p, q) for p, q in zip(before, after))
        kl = th.distributions.kl_divergence(before, after)
        return kl.reshape(MANY, -1).sum(dim=1)

    snapshot, before = passes.snapshot(x, actions), distribution()
    assert passes.kl_divergence(snapshot, passes.snapshot(x, actions)) == pytest.approx(0, abs=1e-7)
    with th.no_grad():
        for p in policy.parameters():
            p += 0.1 * th.randn_like(p)
    expected = own_kl(before, distribution()).mean().item()
    assert passes.kl_divergence(snapshot, passes.snapshot(x, actions)) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4


def test_the_divergence_of_a_policy_with_passes_of_its_own_is_estimated_from_log_probabilities():
    policy = ActorCriticPolicy(BOX, DISCRETE, lambda _: 0.1)
    passes, fast = PolicyRunner(policy), make_policy_runner(policy)
    x = observations(1).repeat(100_000, 1)
    with th.no_grad():
        actions = policy.get_distribution(x).get_actions().reshape(-1, 1).float()
        before, exact_before = passes.snapshot(x, actions), fast.snapshot(x, actions)
        policy.action_net.bias += th.tensor([0.3, -0.3, 0.1, 0.0])[: len(policy.action_net.bias)]
    exact = fast.kl_divergence(exact_before, fast.snapshot(x, actions))
    assert passes.kl_divergence(before, passes.snapshot(x, actions)) == pytest.approx(exact, rel=0.05)


class Mixture(DiagGaussianDistribution):
    """Two equal Gaussians, which PyTorch does not know to be one."""

    def proba_distribution(self, mean_actions, log_std):
        twice = Normal(mean_actions[:, None], log_std.exp()).expand((len(mean_actions), 2, self.action_dim))
        self.distribution = MixtureSameFamily(Categorical(logits=th.zeros(len(mean_actions), 2)), Independent(twice, 1))
        return self

    def log_prob(self, actions):
        return self.distribution.log_prob(actions)

    def sample(self):
        return self.distribution.sample()

    def entropy(self):
        return None


def test_the_divergence_of_distributions_for_which_pytorch_has_no_formula_is_estimated_from_samples():
    policy = ActorCriticPolicy(BOX, ACTION_SPACES["Box"], lambda _: 0.1)
    gaussian = make_policy_runner(policy)
    x = observations(1).repeat(100_000, 1)
    actions = th.zeros(len(x), policy.action_dist.action_dim)
    exact_before = gaussian.snapshot(x, actions)
    policy.action_dist = Mixture(policy.action_dist.action_dim)
    mixture = make_policy_runner(policy)
    before = mixture.snapshot(x, actions)
    with th.no_grad():
        policy.action_net.bias += 0.3
    exact = gaussian.kl_divergence(exact_before, gaussian.snapshot(x, actions))
    assert mixture.kl_divergence(before, mixture.snapshot(x, actions)) == pytest.approx(exact, rel=0.05)


def test_hooks_of_layers_are_called_in_every_pass():
    policy = POLICIES["observed"]()
    passes = make_policy_runner(policy)
    x = observations(FEW)
    for n_calls, call in enumerate(
        (
            lambda: passes.sample(x, with_values=False),
            lambda: passes.evaluate(x, th.zeros(FEW, 1), with_values=True),
            lambda: passes.snapshot(x, th.zeros(FEW, 1)),
        ),
        start=1,
    ):
        call()
        assert len(policy.calls) == n_calls


def test_weights_that_change_between_two_samples_count(share):
    """As they do where they are updated in place, by an optimizer or by loading."""
    policy = POLICIES["Discrete"](share_features_extractor=share)
    passes = make_policy_runner(policy)
    assert isinstance(passes, FastPolicyRunner)
    for n in (FEW, MANY):
        assert n * 64 * 64 <= LARGEST_NUMPY_PRODUCT or n == MANY
        with th.no_grad():
            policy.action_net.weight.zero_()
            policy.action_net.bias.copy_(th.eye(len(policy.action_net.bias))[0] * 100)
            assert (passes.sample(observations(n), with_values=False)[0] == 0).all()
            policy.action_net.bias.copy_(th.eye(len(policy.action_net.bias))[1] * 100)
        assert (passes.sample(observations(n), with_values=False)[0] == 1).all()


class WithMemory(FlattenExtractor):
    """Keeps an observation of the rollout for the update."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.scale = nn.Parameter(th.ones(()))
        self.last = th.zeros(observation_space.shape)

    def forward(self, observations):
        if not th.is_grad_enabled():
            self.last = observations[0].clone()
        return super().forward(observations) + self.scale * self.last


def test_features_of_the_rollout_may_be_used_in_the_update():
    policy_kwargs = {"features_extractor_class": WithMemory, "share_features_extractor": False, "net_arch": [8]}
    VPG("MlpPolicy", "Pendulum-v1", n_steps=8, policy_kwargs=policy_kwargs, device="cpu").learn(16)


def test_observations_of_any_shape_and_type_are_taken_as_the_policy_takes_them():
    for space in (spaces.Box(-1, 1, (2, 3), np.float64), spaces.Box(-5, 5, (4,), np.int32), spaces.Discrete(5)):
        policy = ActorCriticPolicy(space, DISCRETE, lambda _: 0.1)
        for n in (FEW, MANY):
            x = th.as_tensor(np.stack([space.sample() for _ in range(n)]))
            th.manual_seed(0)
            with th.no_grad():
                expected = policy.get_distribution(x).get_actions()
            th.manual_seed(0)
            np.testing.assert_array_equal(make_policy_runner(policy).sample(x, with_values=False)[0], expected.numpy())


def hooked(policy, name, hook):
    """A hook of the module of this name; "" is the policy, None any module."""
    if name is None:
        return getattr(nn.modules.module, f"register_module_{hook}_hook")
    return getattr(policy.get_submodule(name), f"register_{hook}_hook")


EVERY_MODULE = [
    "",
    "features_extractor",
    "features_extractor.flatten",
    "mlp_extractor",
    "mlp_extractor.policy_net",
    "mlp_extractor.policy_net.0",
    "mlp_extractor.policy_net.1",
    "mlp_extractor.value_net",
    "mlp_extractor.value_net.0",
    "action_net",
    "value_net",
    None,
]
# Backward hooks of the others are not called by A2C: no gradient passes through the observations or policy.forward()
WITH_GRADIENT = [name for name in EVERY_MODULE if name is None or name.startswith(("mlp_extractor", "action", "value"))]


# PyTorch's: observations require no gradient, with A2C as with VPG
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("hook", "name"),
    [(hook, name) for hook in ("forward", "forward_pre") for name in EVERY_MODULE]
    + [(hook, name) for hook in ("full_backward", "full_backward_pre") for name in WITH_GRADIENT],
)
def test_a_hook_that_a2c_calls_is_called_in_rollout_and_update(hook, name):
    """One gradient step per rollout and no learning rate: both train the same."""

    def calls(algorithm, **kwargs):
        model = algorithm(
            "MlpPolicy", "CartPole-v1", n_steps=8, seed=0, policy_kwargs={"net_arch": [8]}, device="cpu", **kwargs
        )
        counts = {"rollout": 0, "update": 0}
        during = "rollout"

        def count(*args):
            counts[during] += 1

        def update(train=model.train):
            nonlocal during
            during = "update"
            train()
            during = "rollout"

        model.train = update
        handle = hooked(model.policy, name, hook)(count)
        try:
            model.learn(16)
        finally:
            handle.remove()
        return counts

    a2c, vpg = calls(A2C), calls(VPG, n_critic_updates=1)
    assert a2c["rollout"] + a2c["update"] > 0
    for part, n_calls in a2c.items():
        assert (vpg[part] > 0) == (n_calls > 0), part
    if "value" not in (name or "") and "forward" in hook:
        # Values are computed for the whole rollout at once, unless features are shared
        assert vpg["rollout"] >= 16


def test_a_hook_of_the_features_extractor_is_called_once_in_each_pass(share):
    policy = POLICIES["Discrete"](share_features_extractor=share)
    calls = []
    policy.pi_features_extractor.register_forward_hook(lambda *_: calls.append(1))
    passes = make_policy_runner(policy)
    x, actions = observations(FEW), th.zeros(FEW, 1)
    passes.sample(x, with_values=True)
    assert len(calls) == 1
    passes.evaluate(x, actions, with_values=True)
    assert len(calls) == 2


def test_a_hook_of_the_features_extractor_that_changes_its_output_counts(share):
    policy = POLICIES["Discrete"](share_features_extractor=share)
    for extractor in {policy.pi_features_extractor, policy.vf_features_extractor}:
        extractor.register_forward_hook(lambda module, args, output: 3 * output)
    x, actions = observations(MANY), stored_actions(policy, MANY)
    for theirs, ours in zip(
        PolicyRunner(policy).evaluate(x, actions, True), make_policy_runner(policy).evaluate(x, actions, True)
    ):
        th.testing.assert_close(ours, theirs)


def own_evaluation(policy):
    evaluate_actions = policy.evaluate_actions
    policy.evaluate_actions = lambda *args: [2 * x for x in evaluate_actions(*args)]


def own_network(policy):
    mlp = policy.mlp_extractor
    mlp.forward = lambda features: (mlp.forward_actor(2 * features), mlp.forward_critic(3 * features))


def own_network_of_the_actor(policy):
    forward_actor, forward_critic = policy.mlp_extractor.forward_actor, policy.mlp_extractor.forward_critic
    policy.mlp_extractor.forward_actor = lambda features: forward_actor(2 * features)
    policy.mlp_extractor.forward_critic = lambda features: forward_critic(3 * features)


def own_extractor(policy):
    policy.features_extractor = nn.Sequential(nn.Flatten(), Doubled())


@pytest.mark.parametrize("replace", [own_evaluation, own_network, own_network_of_the_actor, own_extractor])
def test_what_is_replaced_in_a_policy_after_construction_counts(replace):
    policy = POLICIES["Discrete"]()
    with th.no_grad():
        # Small at first
        policy.action_net.weight *= 100
    x, actions = observations(MANY), stored_actions(policy, MANY)
    before = make_policy_runner(policy).evaluate(x, actions, with_values=True)
    replace(policy)
    expected = policy.evaluate_actions(x, actions.long().flatten())
    after = make_policy_runner(policy).evaluate(x, actions, with_values=True)
    for theirs, ours, old in zip(expected, after, before):
        th.testing.assert_close(ours, theirs.flatten())
        assert not th.allclose(ours, old)


def test_what_is_replaced_in_a_distribution_after_construction_counts():
    policy = POLICIES["Discrete"]()
    x, actions = observations(MANY), stored_actions(policy, MANY)
    _, before, _ = make_policy_runner(policy).evaluate(x, actions, with_values=True)
    proba_distribution = policy.action_dist.proba_distribution
    policy.action_dist.proba_distribution = lambda action_logits: proba_distribution(100 * action_logits)
    expected = policy.evaluate_actions(x, actions.long().flatten())
    after = make_policy_runner(policy).evaluate(x, actions, with_values=True)
    for theirs, ours in zip(expected, after):
        th.testing.assert_close(ours, theirs.flatten())
    assert not th.allclose(after[1], before)


class ColumnOfLogProbabilities(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob[:, None], entropy


def test_log_probabilities_may_be_a_column():
    classes = (ActorCriticPolicy, ColumnOfLogProbabilities)
    one, other = (VPG(cls, "CartPole-v1", n_steps=10, seed=0).learn(40) for cls in classes)
    for ours, theirs in zip(one.policy.parameters(), other.policy.parameters()):
        th.testing.assert_close(ours, theirs)


def test_hooks_registered_at_the_start_of_a_rollout_are_called_in_it():
    calls = []

    class Register(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps == 0:
                self.model.policy.register_forward_hook(lambda *_: calls.append(1))

        def _on_step(self):
            return True

    VPG("MlpPolicy", "CartPole-v1", n_steps=8, policy_kwargs={"net_arch": [8]}).learn(8, callback=Register())
    assert len(calls) == 8


class Forbid(nn.Module):
    """Forbids the second action."""

    def forward(self, logits):
        return logits.masked_fill(th.arange(logits.shape[1]) == 1, -th.inf)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_logit_of_minus_infinity_forbids_an_action(activation):
    kwargs = {"net_arch": [8], "activation_fn": activation}
    model = VPG("MlpPolicy", spaces_envs(), n_steps=20, ent_coef=0.01, seed=0, policy_kwargs=kwargs)
    model.policy.action_net = nn.Sequential(model.policy.action_net, Forbid())
    model.learn(80)
    assert set(model.rollout_buffer.actions.ravel()) == {0, 2}
    for name in ("entropy_loss", "policy_loss", "kl_divergence"):
        assert math.isfinite(model.logger.name_to_value[f"train/{name}"])
    # The largest entropy of two actions
    assert 0 < -model.logger.name_to_value["train/entropy_loss"] <= math.log(2) + 1e-6


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_model_on_the_cpu_does_not_use_the_default_device(env_id):
    model = VPG("MlpPolicy", env_id, n_steps=16, device="cpu")
    before = th.get_default_device()
    th.set_default_device("meta")
    try:
        model.learn(32)
    finally:
        th.set_default_device(before)
