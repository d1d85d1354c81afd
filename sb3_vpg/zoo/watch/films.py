"""Write a session as a film: an animated GIF, or an MP4."""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import trange

from sb3_vpg.zoo.watch.drawing import SIZE, Screen
from sb3_vpg.zoo.watch.session import Session

Images = Iterator[npt.NDArray[np.uint8]]

#: Most frames per second. Browsers slow down GIFs with more than 50; 25 keep the files small
MAX_FPS = {".gif": 25, ".mp4": 50}


def check_film(path: Path) -> None:
    """
    :param path: file of a film
    :raises ValueError: if its suffix is unknown or it cannot be written
    """
    if path.suffix not in WRITERS:
        raise ValueError(f"-o {path} is not allowed; allowed: a file name that ends with {' or '.join(WRITERS)}")
    existed = path.exists()
    try:
        # Does not change a file that exists
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"-o {path} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def write_film(path: Path, session: Session, screen: Screen, fps: float, n_steps: int) -> None:
    """
    Write a film that runs at the speed of the environment. Where the environment has more steps per second than the film has
    frames, the film leaves out steps. Ctrl-C ends it early.

    :param path: file, which ends with .gif or .mp4
    :param session: the agent and its environment
    :param screen: draws the frames
    :param fps: steps per second
    :param n_steps: number of steps, >= 1
    """
    steps_per_frame = math.ceil(fps / MAX_FPS[path.suffix])
    n_frames = math.ceil(n_steps / steps_per_frame)
    interrupts: list[int] = []

    def images() -> Images:
        for i in trange(0, n_steps, steps_per_frame, unit="frame"):
            screen.draw(session.advance(min(steps_per_frame, n_steps - i)))
            yield screen.image()
            if interrupts:
                return

    # An exception within the writers would lose the film
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        WRITERS[path.suffix](path, images(), fps / steps_per_frame, n_frames)
    finally:
        signal.signal(signal.SIGINT, handler)


def _write_gif(path: Path, images: Images, fps: float, n_frames: int) -> None:
    from PIL import Image

    # Pillow keeps all frames, about 0.6 MiB each, until the film ends
    first, others = Image.fromarray(next(images)), map(Image.fromarray, images)
    # Frames last hundredths of a second
    durations = 10 * np.diff(np.round(100 / fps * np.arange(n_frames + 1))).astype(int)
    first.save(path, save_all=True, append_images=others, duration=durations.tolist(), loop=0)


def _write_mp4(path: Path, images: Images, fps: float, n_frames: int) -> None:
    from imageio_ffmpeg import write_frames

    writer = write_frames(str(path), SIZE, fps=fps, macro_block_size=4)
    writer.send(None)
    for image in images:
        writer.send(image)
    writer.close()


WRITERS: dict[str, Callable[[Path, Images, float, int], Any]] = {".gif": _write_gif, ".mp4": _write_mp4}
