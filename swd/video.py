"""Videos as MP4 files. Needs the extra `video` (imageio with ffmpeg)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swd.types import UserError


def check_available() -> None:
    """Raise UserError if nothing can write MP4 files here."""
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("writing videos needs ffmpeg; install it with: pip install 'swd[video]'") from None


def write(path: Path, video: Tensor, fps: int, comment: str = "") -> Path:
    """Write `[3, F, H, W]` in [-1, 1] as H.264.

    Args:
        path: of the file.
        video: frames of even sides.
        fps: frames a second.
        comment: goes into the file's metadata.
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


def read(path: Path) -> Tensor:
    """Frames `[3, F, H, W]` in [-1, 1] of a video file."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]  # type: ignore[index]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]  # type: ignore[arg-type]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
