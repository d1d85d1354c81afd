"""Gradients by several threads must be those of one."""

import os
import threading

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

import sb3_vpg.buffers
import sb3_vpg.vpg
from sb3_vpg import VPG
from sb3_vpg.common.policy_runner import LARGEST_SMALL_LAYER, make_policy_runner
from sb3_vpg.common.threads import Gradient, _pool, accumulate_gradients, one_thread


@pytest.fixture
def two_threads():
    before = th.get_num_threads()
    th.set_num_threads(2)
    yield
    th.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sb3_vpg.buffers, "CPU_CHUNK", (2**21, 50, 50))


def test_one_thread_is_for_its_block_only(two_threads):
    with one_thread():
        assert th.get_num_threads() == 1
    assert th.get_num_threads() == 2
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert th.get_num_threads() == 2


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_sum_of_the_gradients_does_not_depend_on_the_threads(n_threads):
    th.manual_seed(0)
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    chunks = list(th.randn(7, 10, 3))

    def loss_of(chunk):
        return (net(chunk) ** 2).sum() + other(chunk).sum(), (len(chunk), threading.current_thread().name)

    expected = th.autograd.grad(sum(loss_of(chunk)[0] for chunk in chunks), list(net.parameters()))

    def gradient_of(chunk):
        loss, extra = loss_of(chunk)
        return Gradient([loss], [th.ones_like(loss)]), extra

    told = list(accumulate_gradients(gradient_of, iter(chunks), list(net.parameters()), n_threads))
    assert [n for n, _ in told] == [10] * 7
    assert all(("sb3_vpg" in name) == (n_threads > 1) for _, name in told)
    for p, g in zip(net.parameters(), expected):
        th.testing.assert_close(p.grad, g)
    assert all(p.grad is None for p in other.parameters())
    # They are added to those that are there
    list(accumulate_gradients(gradient_of, iter(chunks), list(net.parameters()), n_threads))
    for p, g in zip(net.parameters(), expected):
        th.testing.assert_close(p.grad, 2 * g)
        assert p.grad.stride() == p.stride()


def test_an_error_in_a_thread_is_raised_and_leaves_the_number_of_threads(two_threads):
    def loss_of(chunk):
        raise ArithmeticError(chunk)

    with pytest.raises(ArithmeticError, match="first"):
        list(accumulate_gradients(loss_of, ["first", "second"], [], 2))
    assert th.get_num_threads() == 2


def trained(n_threads, **kwargs):
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    # The first weights are orthogonalised by LAPACK, whose rounding depends on the threads
    th.set_num_threads(1)
    model = VPG("MlpPolicy", env, n_steps=50, seed=0, learning_rate=0.01, device="cpu", **kwargs)
    th.set_num_threads(n_threads)
    model.learn(800)
    assert th.get_num_threads() == n_threads
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"estimator": "gae", "n_critic_updates": 3},
        {"estimator": "reward_to_go", "n_critic_updates": 1},
        {"ent_coef": 0.01, "n_critic_updates": 1},
    ],
    ids=str,
)
def test_a_training_on_two_threads_gives_the_weights_of_one(kwargs, small_chunks, two_threads, monkeypatch):
    used = []
    monkeypatch.setattr(
        sb3_vpg.vpg, "accumulate_gradients", lambda *args: used.append(args[3:]) or accumulate_gradients(*args)
    )
    on_two = trained(2, **kwargs)
    # Further passes of the critic use one thread
    assert set(used) == ({(2,), ()} if kwargs.get("n_critic_updates", 1) > 1 else {(2,)})
    for name, w in trained(1, **kwargs).items():
        assert th.equal(on_two[name], w), name


def test_what_is_not_known_to_be_safe_runs_on_one_thread(small_chunks, two_threads):
    def small(change=lambda policy: None, **kwargs):
        model = VPG("MlpPolicy", "CartPole-v1", device="cpu", **kwargs)
        change(model.policy)
        return make_policy_runner(model.policy).single_threaded

    assert small()
    assert not small(lambda policy: policy.action_net.register_forward_hook(lambda *_: None))
    assert not small(lambda policy: policy.value_net.weight.register_post_accumulate_grad_hook(lambda _: None))
    assert not small(policy_kwargs={"features_extractor_class": OwnFeatures})
    assert not make_policy_runner(VPG("LogisticPolicy", "CartPole-v1").policy).single_threaded
    assert not make_policy_runner(VPG("MlpPolicy", "Pendulum-v1", use_sde=True).policy).single_threaded
    # Wide layers gain by PyTorch's own threads
    width = int(np.sqrt(LARGEST_SMALL_LAYER)) + 1
    assert not small(policy_kwargs={"net_arch": [width, width], "ortho_init": False})


class OwnFeatures(FlattenExtractor):
    pass


def test_threads_that_share_operations_get_larger_chunks(small_chunks, two_threads):
    def chunk_size(device="cpu", **kwargs):
        model = VPG("MlpPolicy", "CartPole-v1", device="cpu", **kwargs)
        model.rollout_buffer.device = th.device(device)
        return model._chunk_size(make_policy_runner(model.policy))

    assert chunk_size() == 50
    own = {"policy_kwargs": {"features_extractor_class": OwnFeatures}}
    assert chunk_size(**own) == 2 * 50
    # 4 numbers of 4 bytes each
    assert chunk_size("cuda") == min(2**30 // 16, 2**16)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    list(_pool(2).map(abs, [1, 2]))
    pid = os.fork()
    if pid == 0:
        # In the child: no test machinery must go on
        try:
            os._exit(0 if list(_pool(2).map(abs, [-1, -2])) == [1, 2] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
