"""Trained agents are pushed to the Hugging Face Hub and loaded from it, by the zoo's commands."""

import pytest
import yaml
from helpers.agents import AGENTS, AT_LEAST, mean_return
from helpers.installed import HOOK_OFF, Environment, output_of

# The Hub as a folder. What is missing raises what huggingface_hub raises.
HUB = """
import os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import huggingface_hub
from huggingface_hub import errors

HUB = Path(os.environ["HUB"])
NotFound = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)

class HfApi:
    def create_repo(self, repo_id, **kwargs):
        (HUB / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def snapshot_download(self, repo_id, local_dir):
        shutil.copytree(HUB / repo_id, local_dir, dirs_exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, HUB / repo_id, dirs_exist_ok=True)

def hf_hub_download(repo_id, filename, **kwargs):
    path = HUB / repo_id / filename
    if not path.is_file():
        raise NotFound(f"404: {filename}", response=SimpleNamespace(headers={}, request=None))
    return str(path)

huggingface_hub.HfApi, huggingface_hub.hf_hub_download = HfApi, hf_hub_download
# What has taken the others is imported anew
for name in [name for name in sys.modules if name.startswith("huggingface_sb3")]:
    del sys.modules[name]
"""


def with_hub(installed: Environment) -> dict[str, str]:
    """:return: environment variables with which huggingface_hub is a folder"""
    site = installed.cwd / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HUB)
    return {"PYTHONPATH": str(site), "HUB": str(installed.cwd / "the_hub"), "TRUST_REMOTE_CODE": "True"}


@pytest.mark.parametrize(
    ("commands", "variables", "env_id"),
    [
        ("rl_zoo3.{}", {}, "CartPole-v1"),
        ("sb3_vpg {}", HOOK_OFF, "CartPoleSwingUp-v0"),
    ],
    ids=["with the hook, without VecNormalize", "without the hook, with VecNormalize"],
)
def test_an_agent_is_pushed_to_the_hub_and_loaded_from_it(
    beside_agents: Environment, commands: str, variables: dict[str, str], env_id: str
):
    def run(command: str, *arguments: str) -> str:
        whole = ("-m", *commands.format(command).split(), "--algo", "vpg", "--env", env_id, *arguments)
        return output_of(beside_agents.run_warm(*whole, env=with_hub(beside_agents) | variables))

    run("push_to_hub", "-f", "rl-trained-agents", "-orga", "me", "--no-render")
    run("load_from_hub", "-f", "from_hub", "-orga", "me")
    steps, least = AT_LEAST[env_id]
    assert mean_return(run("enjoy", "-f", "from_hub", "-n", str(steps), "--no-render")) >= least
    for name in ("0.monitor.csv", "evaluations.npz", f"{env_id}/config.yml"):
        before, after = (beside_agents.cwd / folder / "vpg" / f"{env_id}_1" / name for folder in (AGENTS, "from_hub"))
        assert before.read_bytes() == after.read_bytes()

    _, metadata, card = (beside_agents.cwd / "the_hub/me" / f"vpg-{env_id}" / "README.md").read_text().split("---\n", 2)
    (result,) = yaml.safe_load(metadata)["model-index"]
    assert result["name"] == "VPG"
    assert result["results"][0]["dataset"]["name"] == env_id
    assert 'pip install "sb3_vpg[zoo]"' in card
    assert "pip install rl_zoo3" not in card
    assert f"python -m rl_zoo3.load_from_hub --algo vpg --env {env_id} -orga me -f logs/" in card


def test_model_cards_of_other_algorithms_stay_as_they_are(installed: Environment):
    script = """
import sys
from pathlib import Path
import rl_zoo3
from huggingface_hub.repocard import metadata_save
for algo in ("ppo", "vpg"):
    Path("card.md").write_text(f"pip install rl_zoo3; python -m rl_zoo3.enjoy --algo {algo} --env CartPole-v1")
    metadata_save("card.md", {"library_name": "stable-baselines3"})
    print("sb3_vpg" in Path("card.md").read_text())
"""
    process = installed.run_warm("-c", script)
    output_of(process)
    assert process.stdout.split() == ["False", "True"]
