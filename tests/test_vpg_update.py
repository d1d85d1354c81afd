"""One update: entropy bonus, clipping, and gradients added up over chunks."""

import numpy as np
import pytest
import torch as th
from helpers.envs import BOX
from helpers.models import ACTOR, CRITIC, SGD, SMALL, Normalized, assert_same_weights, changed, small_model, weights

import sb3_vpg.buffers


def test_the_entropy_bonus_raises_the_entropy_and_a_negative_one_lowers_it():
    observations = th.as_tensor(np.stack([BOX.sample() for _ in range(50)]))
    entropies = []
    for ent_coef in (-1.0, 0.0, 1.0):
        model = small_model(policy_kwargs=SGD, learning_rate=0.1, max_grad_norm=None, ent_coef=ent_coef)
        with th.no_grad():
            # Away from the uniform policy, which has all the entropy there is
            model.policy.action_net.bias.copy_(th.tensor([1.0, 0.0, -1.0]))
        model.learn(100)
        with th.no_grad():
            entropies.append(model.policy.get_distribution(observations).entropy().mean().item())
    assert entropies[0] + 0.05 < entropies[1] < entropies[2] - 0.05


def test_a_huge_value_loss_does_not_scale_the_policy_gradient_down():
    without, huge = (small_model(policy_kwargs=SGD, vf_coef=c, max_grad_norm=0.5).learn(20) for c in (0.0, 1e6))
    assert_same_weights(without, huge, ACTOR)
    start = small_model(policy_kwargs=SGD)
    # ... and is itself clipped: the length of the critic's step is learning rate times norm
    step = [huge.policy.get_parameter(name) - w for name, w in weights(start, CRITIC).items()]
    assert th.sqrt(sum((s**2).sum() for s in step)).item() == pytest.approx(huge.learning_rate * 0.5, rel=1e-3)
    assert changed(weights(start, CRITIC), weights(without, CRITIC)) == set()


def test_the_policy_gradient_is_clipped_to_the_maximum_norm():
    start = small_model(policy_kwargs=SGD, learning_rate=0.5)
    clipped = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=0.0625).learn(20, log_interval=None)
    assert clipped.logger.name_to_value["train/policy_grad_norm"] > 0.0625
    step = [clipped.policy.get_parameter(name) - w for name, w in weights(start, ACTOR).items()]
    assert th.sqrt(sum((s**2).sum() for s in step)).item() == pytest.approx(0.5 * 0.0625, rel=1e-3)


@pytest.mark.parametrize(
    "keywords",
    [
        {"n_critic_updates": 3, "ent_coef": 0.1},
        {"estimator": "reward_to_go", "loss_reduction": "trajectory", "baseline": "time"},
        {"estimator": "total_return", "n_episodes": 3, "baseline": "value"},
    ],
)
def test_gradients_added_up_over_chunks_are_those_of_the_whole_batch(keywords, monkeypatch):
    def trained():
        model = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=None, **keywords)
        chunks = []
        model.policy.action_net.register_forward_hook(
            lambda module, args, output: chunks.append(len(output)) if model.policy.training else None
        )
        return model.learn(1, log_interval=None), chunks

    whole, whole_chunks = trained()
    monkeypatch.setattr(sb3_vpg.buffers, "CPU_CHUNK", (2**21, 7, 7))
    in_chunks, chunks = trained()
    assert len(whole_chunks) == 1
    assert max(chunks) <= 7
    assert sum(chunks) == whole_chunks[0] > 14
    for name, w in weights(whole).items():
        th.testing.assert_close(in_chunks.policy.get_parameter(name), w, rtol=1e-4, atol=1e-6)
    logged, expected = in_chunks.logger.name_to_value, whole.logger.name_to_value
    for name in ("policy_loss", "entropy_loss", "policy_grad_norm"):
        assert logged[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-4, abs=1e-6)


def test_a_network_with_batch_normalisation_sees_the_whole_batch_at_once(monkeypatch):
    monkeypatch.setattr(sb3_vpg.buffers, "CPU_CHUNK", (2**21, 7, 7))
    kwargs = {**SMALL, "features_extractor_class": Normalized, "share_features_extractor": False}
    model = small_model(policy_kwargs=kwargs, n_critic_updates=2)
    sizes = {"pi": [], "vf": []}
    for name, of_network in sizes.items():
        norm = getattr(model.policy, f"{name}_features_extractor").norm
        norm.register_forward_hook(
            lambda module, args, output, n=of_network: n.append(len(output)) if module.training else None
        )
    before = norm.running_mean.clone()
    model.learn(20)
    assert sizes == {"pi": [20], "vf": [20, 20]}
    assert not th.equal(before, norm.running_mean)


def test_batch_normalization_that_is_added_later_sees_the_whole_batch_too(monkeypatch):
    monkeypatch.setattr(sb3_vpg.buffers, "CPU_CHUNK", (2**21, 7, 7))
    model = small_model()
    norm = th.nn.BatchNorm1d(16)
    model.policy.mlp_extractor.policy_net.append(norm)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters())
    modes = []
    norm.register_forward_hook(lambda module, args, output: modes.append((module.training, len(output))))
    model.learn(20)
    # Actions are sampled in evaluation mode
    assert [mode for mode in modes if mode[0]] == [(True, 20)]
    assert modes[0] == (False, 2)
    assert norm.num_batches_tracked == 1


def test_a_critic_that_the_formulation_does_not_use_stays_as_it_is():
    model = small_model(policy_kwargs={**SMALL, "optimizer_kwargs": {"weight_decay": 0.1}}).learn(20)
    before = weights(model)
    model.estimator = "reward_to_go"
    model.learn(20, reset_num_timesteps=False)
    assert changed(before, weights(model)) == set(weights(model, ACTOR))
