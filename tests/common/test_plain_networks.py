"""Gradients by hand must be those of automatic differentiation, and must not be used where they are not known to be right."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, BOX
from helpers.models import SMALL, changed, small_model, spaces_envs, weights
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from torch import nn

from sb3_vpg import LogisticPolicy
from sb3_vpg.common import plain_networks
from sb3_vpg.common.plain_networks import PlainEvaluation
from sb3_vpg.common.policy_runner import Evaluation, FastPolicyRunner, make_policy_runner

N = 50
MULTI = spaces.MultiDiscrete([2, 3])


def policy(action_space=ACTION_SPACES["Discrete"], cls=ActorCriticPolicy, **kwargs):
    th.manual_seed(0)
    result = cls(BOX, action_space, lambda _: 0.1, **{"net_arch": [16, 8], **kwargs})
    with th.no_grad():
        # Small at first
        result.action_net.weight *= 100
    return result


def rows(action_space, masks=False):
    """Observations, actions and further inputs of the policy."""
    x = th.randn(N, *BOX.shape)
    actions = th.as_tensor(np.array([action_space.sample() for _ in range(N)])).reshape(N, -1).float()
    if not masks:
        return x, actions, {}
    sizes = [action_space.n] if isinstance(action_space, spaces.Discrete) else action_space.nvec.tolist()
    allowed = [th.rand(N, size) < 0.5 for size in sizes]
    for mask, column in zip(allowed, actions.long().T):
        mask.scatter_(1, column[:, None], True)
    return x, actions, {"action_masks": th.cat(allowed, dim=1)}


CASES = {
    "Discrete": (policy(), False),
    "Box": (policy(ACTION_SPACES["Box"]), False),
    "no hidden layer": (policy(net_arch=[]), False),
    "masked Discrete": (policy(cls=MaskableActorCriticPolicy), True),
    "masked MultiDiscrete": (policy(MULTI, MaskableActorCriticPolicy), True),
    "MultiDiscrete without its masks": (policy(MULTI, MaskableActorCriticPolicy), False),
}


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("by_entropy", [0.0, 0.3])
@pytest.mark.parametrize(("policy", "masks"), CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_automatic_differentiation(policy, masks, by_entropy, with_values):
    x, actions, inputs = rows(policy.action_space, masks)
    runner = make_policy_runner(policy)
    by_hand = runner.evaluation(x, actions, with_values, **inputs)
    assert isinstance(by_hand, PlainEvaluation)
    expected = Evaluation(*runner.evaluate(x, actions, with_values, **inputs))
    for name in ("values", "log_prob", "entropy"):
        ours, theirs = getattr(by_hand, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            th.testing.assert_close(ours, theirs)
    by_values, by_log_prob = th.randn(N) if with_values else None, th.randn(N)
    parameters = list(policy.parameters())
    derivatives = (by_values, by_log_prob, by_entropy)
    gradients = by_hand.gradient(*derivatives).of(parameters)
    for gradient, other in zip(gradients, expected.gradient(*derivatives).of(parameters)):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            th.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
    # They are added to those that are there, in the parameters' memory layout
    for _ in range(2):
        by_hand.gradient(*derivatives).add_to(parameters)
    for parameter, gradient in zip(parameters, gradients):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert parameter.grad.stride() == parameter.stride()
            th.testing.assert_close(parameter.grad, 2 * gradient)
    # Added to zero, they are written to its memory, also those of some parameters only
    present = [parameter for parameter in parameters if parameter.grad is not None]
    memory = [parameter.grad for parameter in present]
    for wanted in (present, present[1:]):
        for gradient in memory:
            gradient.zero_()
        by_hand.gradient(*derivatives).add_to(wanted, to_zero=True)
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None and parameter is not present[0]:
                th.testing.assert_close(parameter.grad, gradient)
        assert all(parameter.grad is gradient for parameter, gradient in zip(present, memory))
    assert not present[0].grad.any()
    policy.zero_grad()


@pytest.mark.parametrize("action_space", ["Discrete", "Box"])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    "formulation",
    [
        {"estimator": "gae"},
        {"estimator": "reward_to_go", "baseline": "time"},
        {"estimator": "reward_to_go", "baseline": "value", "scale_value_targets": True},
        {"estimator": "total_return", "loss_reduction": "trajectory"},
        {"estimator": "td_residual", "normalize_advantage": "episode"},
    ],
    ids=lambda f: " ".join(map(str, f.values())),
)
def test_an_update_by_hand_is_the_update_by_automatic_differentiation(formulation, ent_coef, action_space, monkeypatch):
    def trained():
        env = spaces_envs(action_space=ACTION_SPACES[action_space])
        model = small_model(env, ent_coef=ent_coef, device="cpu", n_critic_updates=3, critic_batch_size=7, **formulation)
        model.learn(60)
        return {**dict(model.policy.named_parameters())}

    by_hand = trained()
    monkeypatch.setattr(FastPolicyRunner, "_by_hand", False)
    for name, parameter in trained().items():
        th.testing.assert_close(by_hand[name], parameter, rtol=1e-3, atol=2e-5, msg=name)


def hook(policy):
    policy.mlp_extractor.value_net[1].register_forward_hook(lambda *_: None)


def gradient_hook(policy):
    policy.action_net.weight.register_hook(lambda gradient: 2 * gradient)


def accumulation_hook(policy):
    policy.value_net.bias.register_post_accumulate_grad_hook(lambda _: None)


def double(policy):
    policy.double()


def dropout(policy):
    policy.mlp_extractor.policy_net.append(nn.Dropout())


def other_activation(policy):
    policy.mlp_extractor.value_net[1] = nn.ReLU()


def own_forward(policy):
    policy.action_net.forward = lambda x: 2 * nn.Linear.forward(policy.action_net, x)


def shared_trunk(policy):
    policy.mlp_extractor.value_net = policy.mlp_extractor.policy_net


def tied_weight(policy):
    policy.mlp_extractor.value_net[2].weight = policy.mlp_extractor.policy_net[2].weight


def computed_log_std(policy):
    nn.utils.parametrize.register_parametrization(policy, "log_std", nn.Tanh())


def log_std_of_all_dimensions(policy):
    policy.log_std = nn.Parameter(th.zeros(1))


CHANGES = [
    *(hook, gradient_hook, accumulation_hook, double, dropout, other_activation, own_forward),
    *(shared_trunk, tied_weight, computed_log_std, log_std_of_all_dimensions),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_left_to_automatic_differentiation(change):
    plain = policy(spaces.Box(-1, 1, (3,)))
    assert make_policy_runner(plain)._by_hand
    change(plain)
    with th.no_grad():
        assert not make_policy_runner(plain)._by_hand


@pytest.mark.parametrize("change", [log_std_of_all_dimensions, computed_log_std])
def test_a_standard_deviation_of_ones_own_has_the_entropy_and_the_gradient_of_the_policy(change):
    own = policy(spaces.Box(-1, 1, (3,)))
    change(own)
    x, actions = th.randn(N, *BOX.shape), th.randn(N, 3)
    _, log_prob, entropy = make_policy_runner(own).evaluate(x, actions, with_values=False)
    _, expected, expected_entropy = own.evaluate_actions(x, actions)
    th.testing.assert_close(log_prob, expected)
    th.testing.assert_close(entropy, expected_entropy)
    parameter = next(p for name, p in own.named_parameters() if "log_std" in name)
    ours, theirs = (
        th.autograd.grad((x + y).sum(), parameter)[0] for x, y in ((log_prob, entropy), (expected, expected_entropy))
    )
    th.testing.assert_close(ours, theirs)


def test_memory_is_in_single_precision_whatever_the_default_is():
    plain, x, actions = policy(), th.randn(N, *BOX.shape), th.zeros(N, dtype=th.long)
    plain_networks._buffers.__init__()
    th.set_default_dtype(th.float64)
    try:
        make_policy_runner(plain).evaluation(x, actions, with_values=True)
    finally:
        th.set_default_dtype(th.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: policy(ACTION_SPACES["Box"], use_sde=True),
        lambda: policy(MULTI),
        lambda: policy(activation_fn=nn.ReLU),
        lambda: LogisticPolicy(BOX, spaces.Discrete(2), lambda _: 0.1),
        lambda: ActorCriticCnnPolicy(spaces.Box(0, 255, (1, 36, 36), "uint8"), ACTION_SPACES["Discrete"], lambda _: 0.1),
        lambda: MultiInputActorCriticPolicy(spaces.Dict({"x": BOX}), ACTION_SPACES["Discrete"], lambda _: 0.1),
    ],
    ids=["gSDE", "MultiDiscrete", "ReLU", "logistic", "CNN", "Dict"],
)
def test_other_policies_are_left_to_automatic_differentiation(make):
    assert not make_policy_runner(make())._by_hand


def test_a_hook_that_changes_a_gradient_counts_in_the_update():
    unchanged = []
    for change in (lambda gradient: gradient, lambda gradient: 0 * gradient):
        model = small_model(device="cpu", policy_kwargs={**SMALL, "optimizer_class": th.optim.SGD})
        before = model.policy.action_net.weight.detach().clone()
        model.policy.action_net.weight.register_hook(change)
        model.learn(20)
        unchanged.append(th.equal(before, model.policy.action_net.weight))
    assert unchanged == [False, True]


def test_frozen_parameters_do_not_change():
    model = small_model(spaces_envs(action_space=ACTION_SPACES["Box"]), device="cpu")
    frozen = {"log_std", "mlp_extractor.policy_net.0.bias", "value_net.weight"}
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    assert make_policy_runner(model.policy)._by_hand
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before) - frozen


def test_memory_that_is_kept_is_bounded():
    wide = plain_networks.LARGEST_BUFFER // N + 1
    for width in (8, 16, wide):
        runner = make_policy_runner(policy(net_arch=[width], ortho_init=False))
        x, actions, _ = rows(ACTION_SPACES["Discrete"])
        runner.evaluation(x, actions, with_values=True).gradient(th.ones(N), th.ones(N))
    sizes = [len(buffer) for buffer in plain_networks._buffers._buffers.values()]
    assert max(sizes) <= plain_networks.LARGEST_BUFFER


def test_batches_of_the_value_regression_are_those_of_the_buffer():
    model = small_model(n_critic_updates=1)
    model.learn(20)
    buffer = model.recorder
    for ours, theirs in zip(buffer.get_value_samples(7, shuffle=False), buffer.get(7, shuffle=False), strict=True):
        assert th.equal(ours.observations, theirs.observations)
        assert th.equal(ours.returns, theirs.returns)
