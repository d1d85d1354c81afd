"""Films of ``watch``."""

import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt


def read_film(path: Path) -> list[npt.NDArray[np.uint8]]:
    """:return: the frames of an animated GIF or an MP4, shape (height, width, 3)"""
    if path.suffix == ".gif":
        from PIL import Image, ImageSequence

        with Image.open(path) as film:
            return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    from imageio_ffmpeg import get_ffmpeg_exe

    from sb3_vpg.zoo.watch.drawing import SIZE

    # imageio_ffmpeg's own reader leaves pipes open
    decode = [get_ffmpeg_exe(), "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(decode, capture_output=True, check=True).stdout
    return list(np.frombuffer(pixels, np.uint8).reshape(-1, SIZE[1], SIZE[0], 3))
