"""What runs on a GPU is what runs on the CPU, up to rounding."""

import copy

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from helpers.models import SGD, Spy, assert_same_weights, changed, small_kwargs, weights
from helpers.ranks import in_ranks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from test_maskable import masked_envs
from test_recurrent import SGD as LSTM
from test_recurrent import walks
from test_vpg_is_a2c import FORCE, IMAGE, VECTOR

from sb3_vpg import VPG, MaskableVPG, RecurrentVPG
from sb3_vpg.diagnostics.callback import rollout_statistics

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU"),
    # SB3's advice for small networks
    pytest.mark.filterwarnings("ignore:You are trying to run:UserWarning"),
    # PyTorch's own, in the first backward pass
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
GPU = "cuda"
CNN = small_kwargs("CnnPolicy", optimizer_class=th.optim.SGD)
DICT = spaces.Dict({"a": VECTOR, "b": FORCE})
#: Class, policy, environments, further keywords
CASES = {
    "discrete": (VPG, "MlpPolicy", lambda: walks(), {}),
    "box": (VPG, "MlpPolicy", lambda: walks(VECTOR, FORCE), {"ent_coef": 0.1}),
    "multi-discrete": (VPG, "MlpPolicy", lambda: walks(VECTOR, spaces.MultiDiscrete([2, 3])), {}),
    "multi-binary": (VPG, "MlpPolicy", lambda: walks(VECTOR, spaces.MultiBinary(3)), {}),
    "gSDE": (VPG, "MlpPolicy", lambda: walks(VECTOR, FORCE), {"use_sde": True}),
    "dict": (VPG, "MultiInputPolicy", lambda: walks(DICT, FORCE), {}),
    "CNN": (VPG, "CnnPolicy", lambda: walks(IMAGE), {"policy_kwargs": CNN}),
    "no critic": (VPG, "MlpPolicy", lambda: walks(), {"estimator": "reward_to_go", "baseline": "time"}),
    "scaled targets": (VPG, "MlpPolicy", lambda: walks(), {"scale_value_targets": True}),
    "masks": (MaskableVPG, "MlpPolicy", lambda: masked_envs(n_envs=3), {}),
    "LSTM": (RecurrentVPG, "MlpLstmPolicy", lambda: walks(), {"policy_kwargs": LSTM}),
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """cuDNN's convolutions have 10 bits of precision unless told otherwise."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)


def model_of(case, device):
    cls, policy, make_env, keywords = CASES[case]
    common = {"n_steps": 12, "seed": 0, "n_critic_updates": 3, "learning_rate": 0.01, "policy_kwargs": SGD}
    return cls(policy, make_env(), device=device, **{**common, **keywords})


def assert_close(first, second):
    expected = second.policy.state_dict()
    for name, weight in first.policy.state_dict().items():
        np.testing.assert_allclose(weight.cpu(), expected[name].cpu(), rtol=1e-3, atol=1e-5, err_msg=name)


def give_rollout(gpu, cpu):
    """The GPU's model gets the rollout of the CPU's."""
    gpu.rollout_buffer = gpu.recorder = copy.deepcopy(cpu.rollout_buffer)
    gpu.rollout_buffer.device = gpu.device
    if isinstance(cpu, RecurrentVPG):
        gpu._first_states = cpu._first_states.to(gpu.device)


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_that_of_the_cpu(case):
    cpu, gpu = model_of(case, "cpu"), model_of(case, GPU)
    gpu.set_logger(Logger(None, []))
    before = weights(cpu)

    def follow(spy):
        give_rollout(gpu, cpu)
        gpu.train()

    cpu.learn(5 * 36, callback=Spy(follow, "rollout_end"))
    assert_close(gpu, cpu)
    assert cpu._n_updates == gpu._n_updates > 2
    for name, value in gpu.logger.name_to_value.items():
        assert value == pytest.approx(cpu.logger.name_to_value[name], rel=1e-2, abs=1e-4), name
    trained = {name for name, p in cpu.policy.named_parameters() if p.grad is not None}
    assert changed(before, weights(cpu)) == trained


@pytest.mark.parametrize("case", ["discrete", "box", "CNN", "no critic", "masks"])
def test_the_rollouts_are_those_of_the_cpu(case):
    # Their random numbers are the CPU's
    cpu, gpu = (model_of(case, device).learn(5 * 36) for device in ("cpu", GPU))
    np.testing.assert_allclose(gpu.rollout_buffer.actions, cpu.rollout_buffer.actions, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gpu.rollout_buffer.values, cpu.rollout_buffer.values, rtol=1e-3, atol=1e-4)
    assert_close(gpu, cpu)


@pytest.mark.parametrize("case", ["discrete", "multi-discrete", "gSDE", "masks", "LSTM"])
def test_a_resumed_run_gives_the_same_weights(case, tmp_path):
    whole, half = model_of(case, GPU).learn(4 * 36), model_of(case, GPU).learn(2 * 36)
    half.save(tmp_path / "half")
    th.cuda.manual_seed(7)
    resumed = type(half).load(tmp_path / "half", device=GPU)
    # The environments go on where they are, in the middle of episodes
    resumed.env, resumed.n_envs = half.env, half.n_envs
    resumed._last_obs, resumed._last_episode_starts = half._last_obs, half._last_episode_starts
    assert_same_weights(resumed.learn(2 * 36, reset_num_timesteps=False), whole)


@pytest.mark.parametrize("devices", [("cpu", GPU), (GPU, "cpu")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_model_is_saved_on_one_and_loaded_on_the_other(case, devices, tmp_path):
    first, second = devices
    saved = model_of(case, first).learn(36)
    saved.save(tmp_path / "model")
    loaded = type(saved).load(tmp_path / "model", saved.env, device=second)
    assert loaded.policy.device.type == second
    obs = saved.env.reset()
    actions = [model.predict(obs, deterministic=True)[0] for model in (saved, loaded)]
    np.testing.assert_allclose(*actions, rtol=1e-3, atol=1e-4)
    before = loaded._n_updates
    loaded.learn(36, reset_num_timesteps=False)
    assert loaded._n_updates == before + 1


@pytest.mark.parametrize("case", ["discrete", "masks", "LSTM"])
def test_gradient_statistics_are_those_of_the_cpu(case):
    cpu, gpu = model_of(case, "cpu"), model_of(case, GPU)
    found = []

    def measure(spy):
        give_rollout(gpu, cpu)
        found.extend(map(rollout_statistics, (cpu, gpu)))

    cpu.learn(36, callback=Spy(measure, "rollout_end"))
    for name, estimate in vars(found[0]).items():
        assert vars(found[1])[name].value == pytest.approx(estimate.value, rel=1e-2), name


def trained_in_a_rank(device):
    """A training with one environment in each rank, and the weights after it."""
    env = make_vec_env("CartPole-v1", 1, seed=dist.get_rank())
    model = VPG("MlpPolicy", env, n_steps=32, seed=0, policy_kwargs=SGD, device=device, learning_rate=0.01)
    model.learn(4 * 32 * dist.get_world_size())
    return {name: weight.cpu().numpy() for name, weight in model.policy.state_dict().items()}


@pytest.mark.parametrize(("backend", "size"), [("cpu:gloo,cuda:nccl", 1), ("nccl", 1), ("gloo", 2)])
def test_ranks_train_on_a_gpu(backend, size, tmp_path):
    # NCCL refuses two ranks on one GPU
    on_gpu = in_ranks(trained_in_a_rank, GPU, folder=tmp_path / "gpu", size=size, backend=backend)
    on_cpu = in_ranks(trained_in_a_rank, "cpu", folder=tmp_path / "cpu", size=size)
    for trained, expected in zip(on_gpu, on_cpu):
        for name, weight in trained.items():
            np.testing.assert_allclose(weight, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_auto_is_the_gpu():
    assert VPG("MlpPolicy", walks()).device.type == GPU
