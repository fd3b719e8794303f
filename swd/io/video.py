"""Videos as MP4 files. Needs the extra `video` (imageio with ffmpeg)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swd.types import UserError, in_unit_range


def check_available() -> None:
    """Raise UserError if the package that reads and writes video files is missing."""
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError(
            "reading and writing videos needs ffmpeg; install it with: pip install imageio-ffmpeg"
        ) from None


def write(path: Path, video: Tensor, fps: int, comment: str = "") -> Path:
    """Write `[3, F, H, W]` in [-1, 1] as H.264.

    Args:
        path: of the file.
        video: frames of even sides.
        fps: frames a second.
        comment: text for the file's metadata.
    """
    import imageio_ffmpeg

    frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    height, width = frames.shape[1:3]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        macro_block_size=2,
        quality=8,
        output_params=["-metadata", f"comment={comment}"],
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def read(path: Path, limit: int | None = None) -> Tensor:
    """`read_bytes` in [-1, 1], float32."""
    return in_unit_range(read_bytes(path, limit))


def read_bytes(path: Path, limit: int | None = None) -> Tensor:
    """Frames `[3, F, H, W]`, uint8, of a video file.

    Args:
        path: of the file.
        limit: decode at most this number of frames from the start; None: all.

    Raises:
        UserError: if it cannot be read.
    """
    import imageio_ffmpeg

    # The first item describes the video; frames follow as bytes.
    reader: Any = imageio_ffmpeg.read_frames(str(path))
    try:
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in islice(reader, limit)]
        array = np.stack(frames)
    except (OSError, RuntimeError, ValueError, StopIteration):
        raise UserError(f"{path} cannot be read as a video; remove it") from None
    finally:
        reader.close()  # ends ffmpeg
    return torch.from_numpy(array).permute(3, 0, 1, 2)
