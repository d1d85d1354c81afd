"""Parameters of actor and critic: two groups of one optimizer, frozen layers, fused steps."""

import copy
import inspect
import io
import math
from functools import partial

import pytest
import torch as th
from gymnasium import spaces
from helpers.models import (
    ACTOR,
    CRITIC,
    SGD,
    SMALL,
    assert_same_weights,
    changed,
    learning_rates,
    small_model,
    spaces_envs,
    weights,
    with_and_without_critic,
)
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_vpg import VPG
from sb3_vpg.common.optimization import (
    FlatGradient,
    FusedAdamStep,
    critic_only_parameters,
    fuse_adam,
    n_parts,
    set_learning_rates,
)

# ---------------------------------------------------------------------------------------------------------------
# Spaces and networks
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        (th.optim.SGD, {"momentum": 0.75, "weight_decay": 0.125}),
        (th.optim.RMSprop, {"alpha": 0.5, "eps": 0.25}),
        (RMSpropTFLike, {"alpha": 0.5, "eps": 0.25}),
    ],
)
def test_a_custom_optimizer_keeps_its_arguments_in_both_parameter_groups(optimizer, kwargs):
    model = small_model(policy_kwargs={**SMALL, "optimizer_class": optimizer, "optimizer_kwargs": kwargs})
    assert type(model.policy.optimizer) is optimizer
    groups = model.policy.optimizer.param_groups
    assert len(groups) == 2
    for group in groups:
        assert {name: group[name] for name in kwargs} == kwargs
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.policy.parameters())
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)


# ---------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------


@with_and_without_critic
@pytest.mark.parametrize("frozen", [ACTOR[1], CRITIC[1]], ids=["actor", "critic"])
def test_layers_can_be_frozen_and_thawed_at_any_time(formulation, frozen):
    model = small_model(n_critic_updates=2, learning_rate=0.05, **formulation)

    def learned():
        before = weights(model)
        model.learn(20)
        return {name for name in changed(before, weights(model)) if name.startswith(frozen)}

    layers = [p for name, p in model.policy.named_parameters() if name.startswith(frozen)]
    in_use = bool(learned())
    assert in_use == (frozen == ACTOR[1] or model.plan.uses_value_function)
    for p in layers:
        p.requires_grad_(False)
    assert not learned()
    for p in layers:
        p.requires_grad_(True)
    assert bool(learned()) == in_use


@pytest.mark.parametrize("n_critic_updates", [1, 3])
@pytest.mark.parametrize("critic_batch_size", [None, 8])
def test_a_frozen_critic_leaves_the_actor_to_learn(n_critic_updates, critic_batch_size):
    model = small_model(n_critic_updates=n_critic_updates, critic_batch_size=critic_batch_size)
    for name, p in model.policy.named_parameters():
        p.requires_grad_(not name.startswith(CRITIC))
    before = weights(model)
    model.learn(40)
    assert changed(before, weights(model)) == set(weights(model, ACTOR))


def test_a_frozen_actor_leaves_the_critic_to_learn():
    model = small_model(n_critic_updates=3)
    for name, p in model.policy.named_parameters():
        p.requires_grad_(name.startswith(CRITIC))
    before = weights(model)
    model.learn(40)
    assert changed(before, weights(model)) == set(weights(model, CRITIC))


@with_and_without_critic
def test_a_policy_with_nothing_to_train_is_refused(formulation):
    model = small_model(**formulation)
    model.policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\)"):
        model.learn(20)
    assert model._n_updates == 0


def test_parameters_of_integers_are_left_alone():
    model = small_model(n_critic_updates=3)
    model.policy.register_parameter("count", th.nn.Parameter(th.zeros(2, dtype=th.int64), requires_grad=False))
    before = weights(model)
    model.learn(40)
    assert changed(before, weights(model)) == set(before) - {"count"}


class FrozenCritic(ActorCriticPolicy):
    """Its critic is frozen at construction."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.value_net.requires_grad_(False)
        self.mlp_extractor.value_net.requires_grad_(False)


def test_a_critic_frozen_at_construction_and_thawed_later_is_the_critics():
    model = VPG(FrozenCritic, spaces_envs(), n_steps=10, n_critic_updates=3, critic_learning_rate=0.5, policy_kwargs=SGD)
    assert learning_rates(model) == (0.002, 0.5)
    model.learn(20)
    model.policy.requires_grad_(True)
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)
    assert learning_rates(model) == (0.002, 0.5)
    # Which layers are frozen is not saved, and the groups do not depend on it
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert learning_rates(VPG.load(file)) == (0.002, 0.5)


@pytest.mark.parametrize("frozen", [ACTOR, CRITIC, ACTOR[1:2]], ids=["actor", "critic", "one layer"])
def test_each_parameter_makes_as_many_steps_as_it_has_gradients(frozen):
    model = small_model(n_critic_updates=1, device="cpu", policy_kwargs=adam())
    parameters = dict(model.policy.named_parameters())
    of_layers = [parameter for name, parameter in parameters.items() if name.startswith(frozen)]
    for n_updates, requires_grad in ((3, False), (1, True), (4, True)):
        for parameter in of_layers:
            parameter.requires_grad_(requires_grad)
        model.learn(n_updates * 20, reset_num_timesteps=False)
        for name, parameter in parameters.items():
            expected = model._n_updates - 3 if name.startswith(frozen) else model._n_updates
            assert model.policy.optimizer.state.get(parameter, {"step": 0})["step"] == expected


@pytest.mark.parametrize("groups", ["one", "one for each parameter"])
def test_another_optimizer_is_split_between_actor_and_critic(groups):
    def trained(replace):
        model = small_model(learning_rate=0.125, critic_learning_rate=0.5, n_critic_updates=2, policy_kwargs=SGD)
        if replace:
            params = list(model.policy.parameters())
            params = params if groups == "one" else [{"params": [p]} for p in params]
            model.policy.optimizer = th.optim.SGD(params, lr=1.0)
        return model.learn(40)

    model = trained(replace=True)
    assert learning_rates(model) == (0.125, 0.5)
    assert_same_weights(model, trained(replace=False))


def test_a_layer_that_replaces_another_is_trained_as_what_it_is():
    model = small_model(learning_rate=0.125, critic_learning_rate=0.5, policy_kwargs=SGD).learn(20)
    model.policy.value_net = nn.Linear(16, 1)
    model.policy.optimizer.add_param_group({"params": model.policy.value_net.parameters()})
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)
    assert learning_rates(model) == (0.125, 0.5)


def adam(**kwargs):
    return {**SMALL, "optimizer_class": th.optim.Adam, "optimizer_kwargs": kwargs}


def test_the_fused_steps_of_adam_are_those_of_the_plain_one():
    def trained(fused):
        model = small_model(policy_kwargs=adam(fused=fused), learning_rate=0.05)
        assert {group["fused"] for group in model.policy.optimizer.param_groups} == {fused is None}
        before = weights(model)
        model.learn(100)
        assert len(changed(before, weights(model))) == len(before)
        return weights(model)

    plain, fused = trained(False), trained(None)
    for name, w in plain.items():
        th.testing.assert_close(fused[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_how_adam_takes_its_steps_can_be_chosen(choice):
    model = small_model(policy_kwargs=adam(**choice))
    groups = model.policy.optimizer.param_groups
    assert all(group[name] == value for group in groups for name, value in choice.items())
    assert not any(group["fused"] for group in groups)


def test_other_optimizers_are_left_as_they_are():
    for optimizer in (th.optim.SGD, th.optim.RMSprop, RMSpropTFLike):
        model = small_model(policy_kwargs={**SMALL, "optimizer_class": optimizer, "optimizer_kwargs": {}})
        assert not any(group.get("fused") for group in model.policy.optimizer.param_groups)


# ---------------------------------------------------------------------------------------------------------------
# Gradients in one piece of memory, and steps with them
# ---------------------------------------------------------------------------------------------------------------


def network():
    th.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    layers[0].float()
    # Another memory layout
    layers[1].weight.data = layers[1].weight.data.T.contiguous().T
    return list(layers.parameters())


def set_gradients(parameters, scale=1.0):
    th.manual_seed(1)
    for parameter in parameters:
        gradient = scale * th.randn(parameter.shape)
        if parameter.grad is None:
            parameter.grad = th.empty_like(parameter)
        parameter.grad.copy_(gradient)


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_a_flat_gradient_is_clipped_like_separate_gradients(max_norm):
    ours, theirs = network(), network()
    for parameters in (ours, theirs):
        set_gradients(parameters)
    gradient = FlatGradient(ours)
    for p, q in zip(ours, theirs):
        assert p.grad.stride() == p.stride()
        assert th.equal(p.grad, q.grad)
    norm = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    assert gradient.clip(max_norm) == pytest.approx(norm.item())
    for p, q in zip(ours, theirs):
        th.testing.assert_close(p.grad, q.grad)
    gradient.zero()
    assert not any(p.grad.any() for p in ours)


def test_a_policy_that_was_converted_has_a_new_gradient():
    model, parameters, _ = with_optimizer("Adam")
    set_gradients(parameters)
    groups = model._parameter_groups
    before = groups.gradient("actor")
    model.policy.double()
    after = groups.gradient("actor")
    assert after is not before
    after.zero()
    assert not any(p.grad.any() for p in groups.actor)


def make_optimizer(name, parameters):
    """An optimizer, and whether its steps are made without its method."""
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "weight_decay": 0.1}]
    fused_adam = partial(th.optim.Adam, groups, betas=(0.5, 0.9), fused=True)
    if name == "hook":
        optimizer = fused_adam()
        optimizer.register_step_post_hook(lambda *_: parameters[0].data.zero_())
        return optimizer, False
    if name == "schedule":
        optimizer = fused_adam()
        # It replaces the method by one that counts
        th.optim.lr_scheduler.ConstantLR(optimizer)
        return optimizer, False
    return {
        "Adam": lambda: (fused_adam(), True),
        "maximize": lambda: (fused_adam(maximize=True), True),
        "AMSGrad": lambda: (fused_adam(amsgrad=True), False),
        "decoupled": lambda: (fused_adam(decoupled_weight_decay=True), False),
        "not fused": lambda: (th.optim.Adam(groups, fused=False), False),
        "AdamW": lambda: (th.optim.AdamW(groups, fused=True), False),
        "SGD": lambda: (th.optim.SGD(groups, lr=0.1), False),
    }[name]()


def with_optimizer(name):
    """A model with an optimizer, its parameters, and whether the optimizer's steps are made without its method."""
    model = small_model(device="cpu")
    parameters = list(model.policy.parameters())
    model.policy.optimizer, short = make_optimizer(name, parameters)
    model._parameter_groups.refresh(model.policy)
    return model, parameters, short


@pytest.fixture
def short_steps(monkeypatch):
    """Counts the steps that are made without the optimizer's method."""
    made = []
    call = FusedAdamStep.__call__
    monkeypatch.setattr(FusedAdamStep, "__call__", lambda step: made.append(step) or call(step))
    return made


OPTIMIZERS = ["Adam", "maximize", "AMSGrad", "hook", "schedule", "not fused", "AdamW", "SGD"]
# Since PyTorch 2.7
if "decoupled_weight_decay" in inspect.signature(th.optim.Adam).parameters:
    OPTIMIZERS.append("decoupled")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimizers_step(name, short_steps):
    (model, ours, short), (other, theirs, _) = with_optimizer(name), with_optimizer(name)
    groups = model._parameter_groups
    for n, roles in enumerate([("actor", "critic"), ("actor", "critic"), ("critic",), ("critic",), ("actor", "critic")]):
        for parameters in (ours, theirs):
            # One layer has no gradient, and so no step
            set_gradients(parameters[:-1], scale=(-2.0) ** n)
        short_steps.clear()
        groups.step(*roles)
        # The first step is the optimizer's own
        assert len(short_steps) == len(roles) * (short and n > 0)
        all_groups = other.policy.optimizer.param_groups
        other.policy.optimizer.param_groups = [group for group in all_groups if group["role"] in roles]
        other.policy.optimizer.step()
        other.policy.optimizer.param_groups = all_groups
        assert {group["role"] for group in model.policy.optimizer.param_groups} == {"actor", "critic"}
        # As when parameters are loaded: the tensors may be copies, the groups always are
        state = model.policy.optimizer.state_dict()
        if n in (1, 3):
            model.policy.optimizer.load_state_dict(copy.deepcopy(state) if n == 3 else state)
            groups.refresh(model.policy)
        for one in (model, other):
            set_learning_rates(one.policy.optimizer, {"learning_rate": 0.1 + n, "critic_learning_rate": 0.2 + n})
    for p, q in zip(ours, theirs):
        assert th.equal(p, q)
        state, other_state = model.policy.optimizer.state.get(p, {}), other.policy.optimizer.state.get(q, {})
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert th.equal(th.as_tensor(value), th.as_tensor(other_state[key]))


def new_averages(optimizer):
    for state in optimizer.state.values():
        state["exp_avg"] = th.zeros_like(state["exp_avg"])


def new_betas(optimizer):
    optimizer.param_groups = [{**group, "betas": (0.25, 0.5)} for group in optimizer.param_groups]


def without_a_parameter(optimizer):
    del optimizer.param_groups[-1]["params"][0]


def split_groups(optimizer):
    parts = [({**group, "weight_decay": 0.5}, group["params"]) for group in optimizer.param_groups]
    optimizer.param_groups = [{**group, "params": [p]} for group, params in parts for p in params]


@pytest.mark.parametrize("change", [new_averages, new_betas, without_a_parameter, split_groups])
def test_a_step_is_that_of_an_optimizer_that_was_changed(change, short_steps):
    (model, ours, _), (other, theirs, _) = with_optimizer("Adam"), with_optimizer("Adam")
    for n in range(6):
        for parameters in (ours, theirs):
            set_gradients(parameters, scale=(-2.0) ** n)
        model._parameter_groups.step("actor", "critic")
        other.policy.optimizer.step()
        if n == 3:
            change(model.policy.optimizer)
            change(other.policy.optimizer)
    assert short_steps
    for p, q in zip(ours, theirs):
        assert th.equal(p, q)


def test_parameters_that_are_parts_of_a_tensor_have_gradients_of_their_own():
    large = th.randn(8, 10)
    parameters = [nn.Parameter(large[:, :4]), nn.Parameter(th.ones(4))]
    set_gradients(parameters)
    gradient = FlatGradient(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    assert gradient.clip(None) == pytest.approx(2 * math.sqrt(36))
    # The fused step of PyTorch writes into the rest of the tensor
    optimizer = th.optim.Adam(parameters)
    fuse_adam(optimizer)
    assert not optimizer.param_groups[0]["fused"]


class Embedded(BaseFeaturesExtractor):
    """Has no feature for an observation of 0."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.embedding = nn.Embedding(4, 4)

    def forward(self, observations):
        return self.embedding((observations["x"] if isinstance(observations, dict) else observations).long() - 1).mean(1)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_critics_parameters_are_found_with_an_observation_of_the_space(as_dict):
    box = spaces.Box(1, 4, (2,))
    space, cls = (spaces.Dict({"x": box}), MultiInputActorCriticPolicy) if as_dict else (box, ActorCriticPolicy)
    policy = cls(space, spaces.Discrete(2), lambda _: 0.1, features_extractor_class=Embedded)
    critics = {name for name, p in policy.named_parameters() if id(p) in critic_only_parameters(policy)}
    assert critics == {name for name, _ in policy.named_parameters() if name.startswith(CRITIC)}


def test_a_step_calls_global_hooks(short_steps):
    model, parameters, _ = with_optimizer("Adam")
    groups = model._parameter_groups
    for n_called in (0, 1):
        set_gradients(parameters)
        handle = register_optimizer_step_post_hook(lambda *_: None) if n_called else None
        groups.step("actor", "critic")
        assert not short_steps
    handle.remove()
    groups.step("actor", "critic")
    assert len(short_steps) == 2


def test_gradients_are_set_to_zero_and_those_of_frozen_parameters_removed():
    model, parameters, _ = with_optimizer("Adam")
    groups = model._parameter_groups
    set_gradients(parameters)
    groups.critic[0].requires_grad_(False)
    groups.zero_grad("critic")
    assert groups.critic[0].grad is None
    assert not any(p.grad.any() for p in groups.critic[1:])
    assert all(p.grad.any() for p in groups.actor)
    # A gradient that someone else has set counts
    groups.critic[1].grad = th.full_like(groups.critic[1], 3.0)
    expected = 3.0 * math.sqrt(groups.critic[1].numel())
    assert groups.gradient("critic").clip(None) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------
# Further critic passes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_steps", "n_envs", "expected"),
    [(1, 8, 1), (4096, 8, 1), (4097, 1, 2), (4097, 8, 3), (8192, 256, 3), (16384, 256, 5), (16384, 105, 4), (16385, 30, 7)],
)
def test_each_part_of_a_large_rollout_has_all_environments(n_steps, n_envs, expected):
    assert n_parts(n_steps, n_envs) == expected
    # The environments of the first N steps of the first part
    assert len({index % n_envs for index in range(0, n_envs * expected, expected)}) == n_envs


class Wrapper(th.optim.Optimizer):
    """An optimizer around another one, whose groups it shares, as many in libraries are."""

    def __init__(self, params, **kwargs):
        self.base = th.optim.SGD(params, **kwargs)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure=None):
        return self.base.step(closure)


def test_an_optimizer_around_another_one_makes_one_step_of_the_actor_with_the_scheduled_rate():
    models = [
        small_model(
            learning_rate=lambda left: 0.1 * left,
            n_critic_updates=5,
            policy_kwargs={**SMALL, "optimizer_class": optimizer, "optimizer_kwargs": {"momentum": 0.5}},
        ).learn(40)
        for optimizer in (th.optim.SGD, Wrapper)
    ]
    assert_same_weights(*models)
