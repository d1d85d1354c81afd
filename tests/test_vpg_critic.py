"""The critic learns as often and as fast as asked, and not at all where the formulation has none."""

import numpy as np
import pytest
import torch as th
from helpers.envs import OBSERVATION_SPACES, policy_for
from helpers.models import CRITIC, SGD, Normalized, changed, small_kwargs, small_model, spaces_envs, weights

from sb3_vpg import VPG


def test_vf_coef_scales_the_steps_of_the_critic():
    def steps(vf_coef):
        model = small_model(policy_kwargs=SGD, learning_rate=0.01, max_grad_norm=None, vf_coef=vf_coef)
        before = weights(model)
        after = weights(model.learn(20))
        return {name: after[name] - before[name] for name in before}

    half, two = steps(0.5), steps(2.0)
    for name, step in half.items():
        expected = 4 * step if name.startswith(CRITIC) else step
        th.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-6)
        assert step.abs().max() > 0


@pytest.mark.parametrize("critic_batch_size", [None, 6])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("observation", ["Box", "image", "Dict"])
def test_further_critic_passes_move_only_what_the_actor_does_not_use(observation, share, critic_batch_size):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)

    def trained(n_critic_updates):
        # Momentum and weight decay would move a parameter that takes part without a gradient
        kwargs = small_kwargs(policy, optimizer_class=th.optim.SGD, share_features_extractor=share)
        kwargs["optimizer_kwargs"] = {"momentum": 0.5, "weight_decay": 0.5}
        model = VPG(
            policy,
            spaces_envs(space),
            n_steps=8,
            seed=0,
            policy_kwargs=kwargs,
            n_critic_updates=n_critic_updates,
            critic_batch_size=critic_batch_size,
        )
        return model.learn(16)

    once, often = trained(1), trained(4)
    critic = {name for name in weights(once) if name.startswith(CRITIC)}
    if share:
        critic = {name for name in critic if not name.startswith("vf_features_extractor.")}
    assert changed(weights(once), weights(often)) == critic


@pytest.mark.parametrize(("share", "moved"), [(True, set()), (False, {"vf_features_extractor"})])
def test_further_critic_passes_move_only_statistics_that_the_actor_does_not_use(share, moved):
    kwargs = {"features_extractor_class": Normalized, "share_features_extractor": share}
    model = small_model(n_critic_updates=3, policy_kwargs=kwargs)
    fit_critic, seen = model._fit_critic, []

    def spied(*args):
        before = {name: value.clone() for name, value in model.policy.named_buffers()}
        fit_critic(*args)
        seen.append({name.split(".")[0] for name, value in model.policy.named_buffers() if not th.equal(value, before[name])})

    model._fit_critic = spied
    model.learn(20)
    assert seen == [moved]


def test_the_critic_takes_as_many_steps_and_batches_as_asked():
    model = small_model(n_steps=20, n_critic_updates=3, critic_batch_size=16)
    batches = []
    model.policy.value_net.register_forward_hook(
        lambda module, args, output: batches.append(len(output)) if model.policy.training else None
    )
    model.learn(40)
    # The joint step sees all 40 steps, then two passes over them in minibatches
    assert batches == [40, 16, 16, 8, 16, 16, 8]


def test_further_passes_over_a_large_rollout_use_its_parts_in_turns(monkeypatch):
    keywords = {"n_steps": 20, "policy_kwargs": SGD, "max_grad_norm": None, "critic_learning_rate": 1e-3}
    once, whole = (small_model(n_critic_updates=n, **keywords).learn(40) for n in (1, 4))
    monkeypatch.setattr("sb3_vpg.common.optimization.LARGEST_CRITIC_BATCH", 16)
    in_parts = small_model(n_critic_updates=4, **keywords).learn(40)
    # The steps are so small that the gradient stays the same. Three means over thirds add up to three means over all
    expected = steps_of_critic(whole, since=once)
    assert (steps_of_critic(in_parts, since=once) - expected).norm() < 0.05 * expected.norm()

    model = small_model(n_critic_updates=5, **keywords)
    inputs = []
    model.policy.value_net.register_forward_hook(
        lambda module, args, output: inputs.append(args[0].detach()) if model.policy.training else None
    )
    model.learn(40)
    whole, *parts = inputs
    assert list(map(len, parts)) == [14, 13, 13, 14]
    for k, part in enumerate(parts):
        th.testing.assert_close(part, whole[k % 3 :: 3], rtol=0, atol=0.01)


def test_further_critic_passes_lower_the_value_loss():
    def value_loss(n_critic_updates):
        model = small_model(n_critic_updates=n_critic_updates, learning_rate=0.01).learn(20)
        buffer = model.rollout_buffer
        with th.no_grad():
            values = model.policy.predict_values(th.as_tensor(buffer.observations.reshape(-1, 3))).flatten().numpy()
        return np.mean((buffer.returns.flatten() - values) ** 2)

    assert value_loss(30) < 0.9 * value_loss(1)


def steps_of_critic(model, since):
    """How far the critic's parameters are from those of another model."""
    return th.cat([(model.policy.get_parameter(name) - w).flatten() for name, w in weights(since, CRITIC).items()]).detach()


def test_further_critic_passes_are_clipped_too():
    once, twice = (
        small_model(policy_kwargs=SGD, vf_coef=1e6, max_grad_norm=0.5, n_critic_updates=n).learn(20) for n in (1, 2)
    )
    # The length of a step is learning rate times norm
    assert steps_of_critic(twice, since=once).norm().item() == pytest.approx(once.learning_rate * 0.5, rel=1e-3)


@pytest.mark.parametrize("critic_batch_size", [None, 8])
def test_vf_coef_scales_further_critic_passes_as_a_learning_rate_does(critic_batch_size):
    keywords = {"policy_kwargs": SGD, "max_grad_norm": None, "n_critic_updates": 3, "critic_batch_size": critic_batch_size}
    start = small_model()
    first, second = (
        small_model(vf_coef=vf_coef, critic_learning_rate=rate, **keywords).learn(20)
        for vf_coef, rate in ((0.5, 0.04), (2.0, 0.01))
    )
    th.testing.assert_close(steps_of_critic(first, since=start), steps_of_critic(second, since=start), rtol=1e-3, atol=1e-6)
    assert steps_of_critic(first, since=start).norm() > 0.01


def test_a_critic_pass_in_quarters_takes_four_steps_as_long_as_one_over_the_whole_batch():
    # So small that the gradient does not change from step to step
    keywords = {"policy_kwargs": SGD, "max_grad_norm": None, "critic_learning_rate": 1e-3}
    once = small_model(n_critic_updates=1, **keywords).learn(20)
    whole, quarters = (small_model(n_critic_updates=2, critic_batch_size=n, **keywords).learn(20) for n in (None, 5))
    expected = 4 * steps_of_critic(whole, since=once)
    assert (steps_of_critic(quarters, since=once) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("keywords", [{}, {"partial_episodes": "truncate"}, {"n_episodes": 2}])
@pytest.mark.parametrize("observation", ["Box", "image"])
def test_no_value_is_computed_where_the_formulation_has_none(observation, keywords, share):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    kwargs = small_kwargs(policy, share_features_extractor=share)
    model = VPG(
        policy,
        spaces_envs(space),
        n_steps=10,
        seed=0,
        policy_kwargs=kwargs,
        estimator="reward_to_go",
        n_critic_updates=3,
        **keywords,
    )
    forwards = []
    critic = [model.policy.value_net, model.policy.mlp_extractor.value_net]
    if not share:
        critic.append(model.policy.vf_features_extractor)
    for module in critic:
        module.register_forward_hook(lambda *args: forwards.append(args))
    before = weights(model)
    model.learn(40)
    assert forwards == []
    unused = {name for name in before if name.startswith(CRITIC)}
    if share:
        unused = {name for name in unused if not name.startswith("vf_features_extractor.")}
    assert changed(before, weights(model)) == set(before) - unused
    # The hooks do see a value that is computed
    model.policy.predict_values(model.policy.obs_to_tensor(model.env.reset())[0])
    assert len(forwards) == len(critic)
