"""Files are whole or not there, and loading says what is wrong."""

import errno
import io
import json
import multiprocessing as mp
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers.installed import CHECKOUT
from helpers.models import SMALL, cartpole_model, flat_weights
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.common.checkpoint import atomic_write

DATA = CHECKOUT / "tests" / "data"


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    model = cartpole_model()
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    model.something = lambda: (yield)  # can be pickled
    model.generator = (x for x in ())  # cannot
    with pytest.raises(TypeError, match="generator"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == before
    VPG.load(tmp_path / "model")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = cartpole_model()
    model.save(tmp_path / "model.zip")
    before = (tmp_path / "model.zip").read_bytes()
    real_save, calls = th.save, []

    def save_once(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(*args, **kwargs)

    monkeypatch.setattr(th, "save", save_once)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model.zip")
    assert len(calls) == 2
    assert (tmp_path / "model.zip").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def be_killed_while_saving(path):
    model = cartpole_model()
    model.save(path)
    th.save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    model.num_timesteps = 77
    model.save(path)


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.zip"
    process = mp.get_context("forkserver").Process(target=be_killed_while_saving, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert VPG.load(path).num_timesteps == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", "model.zip"),
        ("model.zip", "model.zip"),
        ("best_0.5", "best_0.5"),
        ("new/folder/model", "new/folder/model.zip"),
        ("folder", "folder.zip"),
        ("archive", "archive.zip_2"),
    ],
)
def test_files_have_the_names_that_sb3_gives_them(name, expected, tmp_path):
    for folder in ("folder", "archive.zip"):
        (tmp_path / folder).mkdir()
    cartpole_model().save(str(tmp_path / name))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(expected)]
    VPG.load(tmp_path / expected)


def test_a_link_stays_a_link_and_a_stream_a_stream(tmp_path):
    model = cartpole_model()
    (tmp_path / "link.zip").symlink_to(tmp_path / "model.zip")
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    VPG.load(tmp_path / "model")
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    assert th.equal(flat_weights(VPG.load(stream)), flat_weights(model))


def test_a_new_file_can_be_read_by_whom_files_can_be_read(tmp_path):
    (tmp_path / "other").touch()
    cartpole_model().save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_replacing_is_for_any_file(tmp_path):
    path = tmp_path / "text"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:  # noqa: PT012
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(share, saved, tmp_path):
    content = saved.read_bytes()
    (tmp_path / "model.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.zip is not a .* incomplete"):
        VPG.load(tmp_path / "model.zip")


def test_a_file_that_is_no_zip_file_is_refused_in_sb3s_words_too(tmp_path):
    (tmp_path / "model.zip").write_text("some text")
    messages = []
    for algorithm in (VPG, PPO):
        with pytest.raises(ValueError, match="zip") as error:
            algorithm.load(tmp_path / "model.zip")
        messages.append(str(error.value))
    ours, theirs = messages
    assert ours.startswith(f"{tmp_path / 'model.zip'} is not a zip file")
    assert theirs in ours


def test_a_byte_that_has_changed_is_noticed(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        member = archive.getinfo("policy.pth")
        at = member.header_offset + 30 + len(member.filename) + len(member.extra) + member.file_size // 2
    content[at] ^= 0xFF
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip is damaged: 'policy\.pth'"):
        VPG.load(tmp_path / "model.zip")


# Of the last entry in the directory: version, flags (encrypted)
@pytest.mark.parametrize(("offset", "mask"), [(6, 0x40), (8, 0x01)])
def test_a_damaged_directory_is_noticed(saved, tmp_path, offset, mask):
    content = bytearray(saved.read_bytes())
    content[content.rindex(b"PK\x01\x02") + offset] ^= mask
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip is not a zip file, or is incomplete"):
        VPG.load(tmp_path / "model.zip")


def test_the_model_of_another_algorithm_is_refused_and_its_weights_can_be_had(tmp_path):
    other = PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=3, policy_kwargs=SMALL)
    other.save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="saved by another algorithm"):
        VPG.load(tmp_path / "ppo")
    model = cartpole_model("CartPole-v1")
    # As the message says
    model.set_parameters(other.get_parameters())
    assert th.equal(flat_weights(model), flat_weights(other))


def test_another_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(
        ValueError, match=r"not a saved model, or is incomplete: it has no 'policy\.optimizer\.pth', 'policy\.pth'"
    ):
        VPG.load(tmp_path / "archive.zip")


def test_no_file_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        VPG.load(tmp_path / "nothing")


def test_a_keyword_that_is_not_known_is_refused(tmp_path):
    VPG("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL).save(tmp_path / "model")
    # Of the constructor, of SB3's `load`, and a counter
    assert VPG.load(tmp_path / "model", n_steps=7, force_reset=False, num_timesteps=3).n_steps == 7
    with pytest.raises(ValueError, match="keyword='n_step' is not known; did you mean 'n_steps'"):
        VPG.load(tmp_path / "model", n_step=7)


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def test_nothing_is_unpickled_before_a_file_is_refused(tmp_path):
    other = PPO("MlpPolicy", "CartPole-v1", n_steps=64, policy_kwargs=SMALL)
    other.evil = Evil()
    other.save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="another algorithm"):
        VPG.load(tmp_path / "ppo")


def test_weights_can_be_had_without_unpickling(saved, tmp_path):
    evil = VPG.load(saved)
    evil.evil = Evil()
    evil.save(tmp_path / "evil")
    model = cartpole_model("CartPole-v1")
    model.set_parameters(tmp_path / "evil", device="cpu")
    assert th.equal(flat_weights(model), flat_weights(evil))


def test_a_file_without_newer_keywords_loads_with_their_defaults(saved, tmp_path):
    newer = {"critic_batch_size", "scale_value_targets", "value_scale", "_random_states", "_resumes", "_stepped_since_reset"}
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(tmp_path / "older.zip", "w") as older:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "data":
                data = json.loads(content)
                assert newer <= set(data)
                content = json.dumps({key: value for key, value in data.items() if key not in newer})
            older.writestr(name, content)
    model = VPG.load(tmp_path / "older", env=make_vec_env("CartPole-v1", 2))
    assert model.critic_batch_size is None
    model.learn(32, reset_num_timesteps=False)


def test_the_model_of_the_first_version_loads_predicts_and_trains():
    # Written by 0.1.0.dev0: VPG("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, seed=0, n_steps=8).learn(64)
    model = VPG.load(DATA / "model_0.1.0.zip", env=make_vec_env("CartPole-v1", 1))
    assert model.num_timesteps == 64
    expected = json.loads((DATA / "model_0.1.0.json").read_text())
    observations = np.array(expected["observations"], np.float32)
    with th.no_grad():
        distribution = model.policy.get_distribution(th.tensor(observations))
    np.testing.assert_allclose(distribution.distribution.probs.numpy(), expected["probabilities"], rtol=1e-5)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 128
