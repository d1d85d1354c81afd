"""The hyperparameter files of the package."""

from pathlib import Path

import yaml

_PACKAGE = Path(__file__).parent.parent
#: Folder of the hyperparameter files: in the package where it is installed, beside it in a checkout
HYPERPARAMS = next(path for path in (_PACKAGE / "hyperparams", _PACKAGE.parent / "hyperparams") if path.is_dir())


def own_config(algo: str, env_id: str) -> str | None:
    """:return: our hyperparameter file, if the zoo has none for the algorithm or no entry for one of our environments"""
    path = HYPERPARAMS / f"{algo}.yml"
    if algo == "vpg" or (path.is_file() and env_id in yaml.safe_load(path.read_text())):
        return str(path)
    return None
