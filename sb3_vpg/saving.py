"""
Files of models: written so that the old one is there until the new one is whole, looked through before they are loaded.

SB3 opens a file for writing before it knows what to write: whatever goes wrong then has destroyed the last good model.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stable_baselines3.common.save_util import open_path

#: What a model's archive must have: keywords and counters, weights, state of the optimizer
MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")


@contextmanager
def replacing(path: str | Path) -> Iterator[io.BufferedWriter]:
    """
    For writing a file in place of another one, if any, all at once: ::

        with replacing("model.zip") as file:
            file.write(content)

    What is written goes to a temporary file in the same folder, which is made if need be. When the block has ended, it takes
    the name ``path`` in one step. If the block raises, it is removed, and ``path`` is what it was.

    :param path: the file to be written, or a link to it
    :return: the file to write to, in binary mode
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # On the disk before the name is: else a power failure could leave an empty file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def model_path(path: str | Path) -> Path:
    """:return: where SB3 saves a model: with ".zip" if there is no suffix, and beside a folder of that name"""
    path = Path(path)
    path = Path(f"{path}.zip") if path.suffix == "" else path
    return Path(f"{path}_2") if path.is_dir() else path


def check_model_file(path: str | Path | io.BufferedIOBase, keyword: str) -> None:
    """
    Look through a model's file without unpickling anything.

    :param path: the file, as SB3's ``load`` takes it
    :param keyword: a keyword that the algorithm's models have and those of other algorithms have not
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, or not a model of this algorithm
    """
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{path} is damaged: {damaged!r} in it does not have the checksum it was saved with")
            missing = sorted(set(MEMBERS) - set(archive.namelist()))
            if missing:
                raise ValueError(f"{path} is not a saved model, or was cut short: it has no {', '.join(map(repr, missing))}")
            if keyword not in json.loads(archive.read("data")):
                raise ValueError(
                    f"{path} was saved by another algorithm: it has no {keyword!r}. Load it with that algorithm; its weights "
                    "can be taken over by set_parameters(other.get_parameters())"
                )
    except zipfile.BadZipFile as error:
        # The last words are SB3's
        raise ValueError(
            f"{path} is not a whole zip file: it is something else, or was cut short. Error: the file {path} wasn't a zip-file"
        ) from error
    finally:
        if isinstance(path, (str, Path)):
            file.close()
        else:
            file.seek(start)
