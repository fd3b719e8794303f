"""Features of many pictures: extracted in batches, stored, read back; and the reference made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swd.data.picture_files import PICTURES, decode
from swd.io.files import write_aside
from swd.metrics.base import Extractor, Gaussian, Reference
from swd.types import UserError

BATCH = 32
"""Pictures in a batch; no feature depends on it."""


def extract(
    extractor: Extractor, pictures: Iterable[Tensor], batch: int = BATCH, device: torch.device | str = "cpu"
) -> Tensor:
    """Features `[N, D]` of N pictures, uint8 `[3, H, W]` each, of any sizes; float32, on the CPU.

    Args:
        extractor: of the features.
        pictures: they are taken one batch at a time.
        batch: pictures in a batch.
        device: where the network runs.
    """
    waiting = iter(pictures)
    rows = [torch.empty(0, extractor.width)]
    while group := [picture.to(device) for picture in islice(waiting, batch)]:
        rows.append(extractor(group).cpu())
    return torch.cat(rows)


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder, in order of their names; folders below it are not read.

    Raises:
        UserError: if there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder of pictures")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)}); give a folder of pictures")
    return files


def read_pictures(files: Iterable[Path]) -> Iterator[Tensor]:
    """The pictures in files, one after another, as uint8 `[3, H, W]`.

    Raises:
        UserError: for a file that cannot be read as a picture.
    """
    for file in files:
        try:
            image = decode(file)
        except Exception as error:  # Pillow raises errors of many types for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} cannot be read as a picture ({reason[:120]}); remove it") from None
        yield torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_features(file: Path, extractor: Extractor, features: Tensor) -> Path:
    """Write features with the name of their extractor and the hash of its weights, to a `.safetensors` file."""
    about = {"extractor": extractor.name, "weights": extractor.weights_id()}
    return write_aside(file, lambda new: save_file({"features": features.contiguous()}, new, about))


def load_features(file: Path, extractor: Extractor) -> Tensor:
    """Features `[N, D]` that `save_features` wrote.

    Raises:
        UserError: if the file is absent or damaged, or holds features of another extractor or other weights.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            features: Tensor = opened.get_tensor("features")
    except (OSError, SafetensorError):
        raise UserError(f"{file} holds no stored features; extract them again") from None
    if about.get("extractor") != extractor.name:
        raise UserError(
            f"{file} holds features of {about.get('extractor')}, not of {extractor.name}; extract them again"
        )
    if about.get("weights") != extractor.weights_id():
        raise UserError(f"{file} was made with other weights of {extractor.name}; extract them again")
    return features


def read_statistics(file: Path, width: int) -> Gaussian:
    """Mean and covariance from a `.npz` file with `mu` `[D]` and `sigma` `[D, D]`, as they are published.

    Such a file does not say which network and preparation it was made with: that they are those of the extractor it is
    used with is the user's word.

    Raises:
        UserError: if it is absent or damaged, has no such arrays, or is of another width than `width`.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            mu, sigma = (torch.from_numpy(opened[name].astype(np.float64)) for name in ("mu", "sigma"))
    except FileNotFoundError:
        raise UserError(
            f"there is no file {file}; give a .npz file with mu and sigma, or a folder of pictures"
        ) from None
    except Exception:  # numpy raises errors of many types for damaged files
        raise UserError(f"{file} is no .npz file with arrays mu and sigma; download it again") from None
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise UserError(
            f"{file} has mu {list(mu.shape)} and sigma {list(sigma.shape)}; {width} features need [{width}] and "
            f"[{width}, {width}]"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{file} holds numbers that are not finite; download it again")
    return Gaussian(mu, sigma)


def read_reference(
    path: str | Path, extractors: Sequence[Extractor], batch: int = BATCH, device: torch.device | str = "cpu"
) -> Reference:
    """Real pictures from a folder, a file of stored features (`.safetensors`), or published statistics (`.npz`).

    Args:
        path: the folder or file. A file is of one extractor.
        extractors: whose features are needed.
        batch: pictures in a batch, for a folder.
        device: where networks run, for a folder.

    Raises:
        UserError: if it is absent, damaged, or of other features.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return Reference(gaussians={each.name: read_statistics(path, each.width) for each in extractors})
    if path.suffix == ".safetensors":
        return Reference({each.name: load_features(path, each) for each in extractors})
    files = picture_files(path)
    return Reference({each.name: extract(each, read_pictures(files), batch, device) for each in extractors})
