"""
The zoo's ``push_to_hub`` and ``load_from_hub`` with VPG.

- Model cards give the command that installs VPG.
- Two incompatibilities between huggingface_hub 2, rl_zoo3 2.9.2 and the huggingface_sb3 that rl_zoo3 requires are fixed.
  They affect all algorithms.

The zoo's commands run as ``__main__`` and import functions from huggingface_sb3 and huggingface_hub. Therefore the functions
are replaced in these two packages, before the commands start.
"""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

#: The installation command in the zoo's model cards, and its replacement for VPG
INSTALL, INSTALL_VPG = "pip install rl_zoo3", 'pip install "sb3_vpg[zoo]"'


def patch() -> None:
    """Replace the functions that rl_zoo3's commands for the Hub import. A second call has no effect."""
    package, repocard = map(importlib.import_module, ("huggingface_sb3", "huggingface_hub.repocard"))
    # import_module, since the package's attribute of this name is a function, not the module
    push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if getattr(package, "patched_for_vpg", False):
        return
    package.patched_for_vpg = True  # type: ignore[attr-defined]
    repocard.metadata_save = _with_install_command(repocard.metadata_save)  # type: ignore[attr-defined]
    package.load_from_hub = _with_http_error(package.load_from_hub)  # type: ignore[attr-defined]
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]


def _with_install_command(metadata_save: Any) -> Any:
    """Replace the installation command of a VPG model card when its metadata is added, the zoo's last step."""

    @functools.wraps(metadata_save)
    def save(local_path: str | Path, data: dict[str, Any]) -> None:
        path = Path(local_path)
        if path.is_file():
            card = path.read_text(encoding="utf-8")
            if re.search(r"rl_zoo3\.enjoy --algo (vpg|ppo_mask)", card):
                path.write_text(card.replace(INSTALL, INSTALL_VPG), encoding="utf-8")
        metadata_save(local_path, data)

    return save


def _with_http_error(load_from_hub: Any) -> Any:
    """
    Raise the ``HTTPError`` of requests if a file is missing. A model without VecNormalize has no file with its statistics, and
    the zoo expects this error then. Current versions of huggingface_hub raise another one.
    """

    @functools.wraps(load_from_hub)
    def load(repo_id: str, filename: str) -> str:
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
        from requests.exceptions import HTTPError

        try:
            return str(load_from_hub(repo_id, filename))
        except LocalEntryNotFoundError:
            # The Hub cannot be reached: the file may exist
            raise
        except EntryNotFoundError as error:
            raise HTTPError(str(error)) from error

    return load
