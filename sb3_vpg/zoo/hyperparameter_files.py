"""Hyperparameter files of the package."""

from pathlib import Path

import yaml

#: Names of the package's algorithms in the zoo
ALGORITHMS = ("vpg", "vpg_lstm", "vpg_mask")
_PACKAGE = Path(__file__).parent.parent
#: Folder of the hyperparameter files: inside an installed package, beside the package in a checkout
HYPERPARAMS = next(path for path in (_PACKAGE / "hyperparams", _PACKAGE.parent / "hyperparams") if path.is_dir())


def own_config(algo: str, env_id: str) -> str | None:
    """
    :return: the package's hyperparameter file for the algorithm, if it has an entry for the environment or a default; None to
        use the zoo's file
    """
    path = HYPERPARAMS / f"{algo}.yml"
    if path.is_file() and not {env_id, "default"}.isdisjoint(yaml.safe_load(path.read_text())):
        return str(path)
    return None
