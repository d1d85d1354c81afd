"""
The zoo's ``push_to_hub`` and ``load_from_hub`` with VPG. Model cards say what to install, and two things are put right that no
algorithm can do with huggingface_hub 2, rl_zoo3 2.9.2 and the huggingface_sb3 that it asks for.

These commands take functions from huggingface_sb3 and huggingface_hub by name, and run as ``__main__``: the functions are
replaced in the two packages, before the commands start.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

#: What the zoo writes into model cards, and what it is to be for VPG
INSTALL, INSTALL_VPG = "pip install rl_zoo3", 'pip install "sb3_vpg[zoo]"'


def patch() -> None:
    """Replace what rl_zoo3's commands for the Hub import. Calling it again changes nothing."""
    package, repocard = map(importlib.import_module, ("huggingface_sb3", "huggingface_hub.repocard"))
    # The package's attribute of this name is a function
    push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if getattr(package, "knows_vpg", False):
        return
    package.knows_vpg = True  # type: ignore[attr-defined]
    repocard.metadata_save = _with_installation(repocard.metadata_save)  # type: ignore[attr-defined]
    package.load_from_hub = _missing_as_expected(package.load_from_hub)  # type: ignore[attr-defined]
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]


def _with_installation(metadata_save: Any) -> Any:
    """The last that the zoo does with a model card is to let the Hub's package put metadata on top of it."""

    @functools.wraps(metadata_save)
    def save(local_path: str | Path, data: dict[str, Any]) -> None:
        path = Path(local_path)
        if path.is_file():
            card = path.read_text(encoding="utf-8")
            if "rl_zoo3.enjoy --algo vpg " in card:
                path.write_text(card.replace(INSTALL, INSTALL_VPG), encoding="utf-8")
        metadata_save(local_path, data)

    return save


def _missing_as_expected(load_from_hub: Any) -> Any:
    """
    A model without VecNormalize has no file of its statistics. The zoo knows that by an error of requests, which the Hub's
    package does not use any more.
    """

    @functools.wraps(load_from_hub)
    def load(repo_id: str, filename: str) -> str:
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
        from requests.exceptions import HTTPError

        try:
            return str(load_from_hub(repo_id, filename))
        except LocalEntryNotFoundError:
            # It may be on the Hub, which cannot be reached
            raise
        except EntryNotFoundError as error:
            raise HTTPError(str(error)) from error

    return load
