"""set_parameters() takes weights and optimizer over from other models, of VPG and of other algorithms."""

import copy

import pytest
import torch as th
from helpers.models import SMALL, cartpole_model, flat_weights
from stable_baselines3 import A2C, PPO

OTHERS = {
    "A2C with Adam": lambda **kwargs: A2C("MlpPolicy", "CartPole-v1", n_steps=8, use_rms_prop=False, **kwargs),
    "PPO": lambda **kwargs: PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=2, **kwargs),
}


def take_over(model, other, form, folder, **kwargs):
    """By a dictionary or by a file."""
    if form == "file":
        other.save(folder / "other")
        model.set_parameters(folder / "other", device="cpu", **kwargs)
    else:
        model.set_parameters(other.get_parameters(), **kwargs)


def known(model):
    """What the optimizer knows of each parameter."""
    state = model.policy.optimizer.state
    return {name: state[p] for name, p in model.policy.named_parameters() if p in state}


def assert_knows_the_same(model, other):
    ours, theirs = known(model), known(other)
    assert ours.keys() == theirs.keys()
    for name, entries in theirs.items():
        assert ours[name].keys() == entries.keys()
        for key, value in entries.items():
            assert th.equal(ours[name][key], value), (name, key)


@pytest.mark.parametrize("form", ["dictionary", "file"])
@pytest.mark.parametrize("exact_match", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_and_optimizer_of_another_algorithm_are_taken_over(name, exact_match, form, tmp_path):
    other = OTHERS[name](seed=1, policy_kwargs=dict(SMALL), device="cpu").learn(32)
    model = cartpole_model("CartPole-v1", learning_rate=0.01, critic_learning_rate=0.02)
    roles = [group["role"] for group in model.policy.optimizer.param_groups]
    take_over(model, other, form, tmp_path, exact_match=exact_match)
    assert th.equal(flat_weights(model), flat_weights(other))
    assert len(known(other)) == len(list(other.policy.parameters()))
    assert_knows_the_same(model, other)
    # Groups, learning rates and the choice of a fused step are VPG's own
    groups = model.policy.optimizer.param_groups
    assert [(group["role"], group["lr"], group["fused"]) for group in groups] == list(zip(roles, [0.01, 0.02], [True, True]))

    for one in (model, other):
        for group in one.policy.optimizer.param_groups:
            group["lr"] = 0.01
        for i, p in enumerate(one.policy.parameters()):
            p.grad = th.full_like(p, 0.1 * i)
        one.policy.optimizer.step()
    th.testing.assert_close(flat_weights(model), flat_weights(other))
    model.learn(32)


def test_an_optimizer_of_another_kind_is_not_taken_over_and_a_warning_says_so(tmp_path):
    other = A2C("MlpPolicy", "CartPole-v1", seed=1, policy_kwargs=dict(SMALL), device="cpu")
    model = cartpole_model("CartPole-v1").learn(16)
    knew = copy.deepcopy(known(model))
    # Nothing is lost of an optimizer that has made no step
    take_over(model, other, "dictionary", tmp_path)
    other.learn(10)
    for form in ("dictionary", "file"):
        with pytest.warns(
            UserWarning, match="state of the optimizer is not loaded: it has no betas, so it is not one of Adam"
        ):
            take_over(model, other, form, tmp_path)
        assert th.equal(flat_weights(model), flat_weights(other))
        for name, entries in known(model).items():
            assert all(th.equal(entries[key], value) for key, value in knew[name].items())
    model.learn(16)


# What Adafactor keeps depends on the number of dimensions of a parameter
@pytest.mark.parametrize("optimizer", [th.optim.RMSprop, th.optim.Adafactor])
def test_an_optimizer_of_the_same_kind_is_taken_over_whatever_the_kind(optimizer, tmp_path):
    kwargs = {**SMALL, "optimizer_class": optimizer}
    other = A2C("MlpPolicy", "CartPole-v1", seed=1, policy_kwargs=dict(kwargs), use_rms_prop=False, device="cpu").learn(10)
    model = cartpole_model("CartPole-v1", policy_kwargs=kwargs)
    take_over(model, other, "dictionary", tmp_path)
    assert known(model)
    assert_knows_the_same(model, other)
    model.learn(16)


@pytest.mark.parametrize(
    ("optimizer", "settings", "other", "missing"),
    [
        ("Adam", {"amsgrad": True}, ("Adam", {}), "max_exp_avg_sq"),
        ("Adam", {}, ("Adamax", {}), "exp_avg_sq"),
        ("RMSprop", {"momentum": 0.9}, ("RMSprop", {}), "momentum_buffer"),
        ("RMSprop", {"centered": True}, ("RMSprop", {}), "grad_avg"),
    ],
)
def test_a_state_that_lacks_something_is_not_taken_over(optimizer, settings, other, missing):
    def trained(name, settings):
        kwargs = {**SMALL, "optimizer_class": getattr(th.optim, name), "optimizer_kwargs": settings}
        return cartpole_model("CartPole-v1", policy_kwargs=kwargs).learn(16)

    model = trained(optimizer, settings)
    with pytest.warns(UserWarning, match=f"state of the optimizer is not loaded: .* needs .*{missing}"):
        model.set_parameters(trained(*other).get_parameters())
    model.learn(16)
    # Without a warning
    model.set_parameters(trained(optimizer, settings).get_parameters())


def as_it_is(model):
    model.learn(16)


def with_a_new_optimizer(model):
    """One group of all parameters, until the next update."""
    model.learn(16)
    optimizer = th.optim.Adam(model.policy.parameters())
    optimizer.state.update(model.policy.optimizer.state)
    model.policy.optimizer = optimizer


def with_reversed_groups(model):
    model.learn(16)
    model.policy.optimizer.param_groups.reverse()


def with_a_frozen_critic(model):
    model.policy.value_net.requires_grad_(False)
    model.policy.mlp_extractor.value_net.requires_grad_(False)
    model.learn(16)


TRAINED = [as_it_is, with_a_new_optimizer, with_reversed_groups, with_a_frozen_critic]


@pytest.mark.parametrize("train_other", TRAINED)
@pytest.mark.parametrize("train", TRAINED)
def test_optimizers_that_group_their_parameters_differently_are_taken_over(train, train_other, tmp_path):
    other, model = cartpole_model(seed=1), cartpole_model(seed=2)
    train_other(other)
    train(model)
    take_over(model, other, "file", tmp_path)
    assert th.equal(flat_weights(model), flat_weights(other))
    assert_knows_the_same(model, other)
    model.learn(16)


def test_a_state_without_names_of_parameters_is_taken_over():
    """As it was saved before there were any."""
    other, model = cartpole_model(seed=1, learning_rate=0.1).learn(16), cartpole_model(seed=2)
    parameters = other.get_parameters()
    for group in parameters["policy.optimizer"]["param_groups"]:
        assert all(name in other.policy.state_dict() for name in group.pop("names"))
    model.set_parameters(parameters)
    assert_knows_the_same(model, other)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [0.1, 0.1]
    assert not any("names" in group for group in model.policy.optimizer.param_groups)


def test_groups_of_unknown_parameters_are_not_taken_over():
    other, model = cartpole_model(seed=1).learn(16), cartpole_model(seed=2)
    first, second = other.policy.optimizer.param_groups
    second["params"].append(first["params"].pop())
    parameters = other.get_parameters()
    for group in parameters["policy.optimizer"]["param_groups"]:
        del group["names"]
    with pytest.warns(UserWarning, match="state of the optimizer is not loaded: it has other groups of parameters"):
        model.set_parameters(parameters)
    assert th.equal(flat_weights(model), flat_weights(other))
    assert known(model) == {}


def test_what_is_taken_over_is_a_copy():
    other, model = cartpole_model(seed=1).learn(16), cartpole_model(seed=2)
    model.set_parameters(other.get_parameters())
    before = copy.deepcopy(known(model))
    other.learn(16)
    for name, entries in known(model).items():
        assert all(th.equal(entries[key], value) for key, value in before[name].items())


def test_parameters_that_are_missing_or_unknown_are_refused_as_by_sb3():
    model = cartpole_model()
    parameters = cartpole_model().get_parameters()
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy.optimizer": parameters["policy.optimizer"]})
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters({**parameters, "actor": {}})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({"policy": {}, "policy.optimizer": {}})
    model.set_parameters({"policy.optimizer": parameters["policy.optimizer"]}, exact_match=False)
    model.set_parameters({"policy": parameters["policy"]}, exact_match=False)
