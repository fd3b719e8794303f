"""Features in batches and files, and references of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from extractors import TinyExtractor, pictures
from PIL import Image

from swd.metrics import features
from swd.types import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of two sizes, named so that they are read in order, and a file that is none."""
    made = tmp_path / "pictures"
    made.mkdir()
    for i in range(7):
        array = pictures(1, i, side=8 + 2 * (i % 2))[0].permute(1, 2, 0).numpy()
        Image.fromarray(array).save(made / f"{i:02}.png")
    (made / "notes.txt").write_text("x")
    return made


@pytest.mark.parametrize("batch", [1, 3, 7, 32])
def test_features_do_not_depend_on_the_batch(folder: Path, batch: int) -> None:
    extractor = TinyExtractor()
    found = features.extract(extractor, features.read_pictures(features.picture_files(folder)), batch)
    expected = torch.cat([extractor(pictures(1, i, side=8 + 2 * (i % 2))) for i in range(7)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert extractor.builds == 1


def test_no_pictures_have_no_features() -> None:
    assert features.extract(TinyExtractor(), []).shape == (0, 6)


def test_stored_features_come_back_and_others_are_refused(tmp_path: Path) -> None:
    extractor, file = TinyExtractor(), tmp_path / "a.safetensors"
    rows = extractor(pictures(5, 0))
    features.save_features(file, extractor, rows)
    assert torch.equal(features.load_features(file, extractor), rows)
    with pytest.raises(UserError, match="holds features of tiny, not of other; extract them again"):
        features.load_features(file, TinyExtractor("other"))
    changed = TinyExtractor()
    changed.weights_id = lambda: "1" * 64  # type: ignore[method-assign]
    with pytest.raises(UserError, match="was made with other weights of tiny"):
        features.load_features(file, changed)
    file.write_bytes(file.read_bytes()[:40])
    for damaged in (file, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match="holds no stored features"):
            features.load_features(damaged, extractor)


def test_references_of_pictures_features_and_statistics(folder: Path, tmp_path: Path) -> None:
    extractor = TinyExtractor()
    real = features.read_reference(folder, [extractor], batch=4).features["tiny"]
    assert real.shape == (7, 6)
    features.save_features(tmp_path / "real.safetensors", extractor, real)
    assert torch.equal(features.read_reference(tmp_path / "real.safetensors", [extractor]).features["tiny"], real)
    mu, sigma = real.double().numpy().mean(0), np.cov(real.double().numpy(), rowvar=False)
    np.savez(tmp_path / "real.npz", mu=mu, sigma=sigma)
    known = features.read_reference(tmp_path / "real.npz", [extractor])
    assert not known.features
    np.testing.assert_array_equal(known.gaussians["tiny"].mu.numpy(), mu)
    np.testing.assert_array_equal(known.gaussians["tiny"].sigma.numpy(), sigma)


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    with pytest.raises(UserError, match="there is no file"):
        features.read_statistics(file, 3)
    np.savez(file, mu=np.zeros(3))
    with pytest.raises(UserError, match=r"no \.npz file with arrays mu and sigma"):
        features.read_statistics(file, 3)
    np.savez(file, mu=np.array([None]), sigma=np.zeros((3, 3)))  # needs pickle
    with pytest.raises(UserError, match=r"no \.npz file with arrays mu and sigma"):
        features.read_statistics(file, 3)
    np.savez(file, mu=np.zeros(4), sigma=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"has mu \[4\] and sigma \[4, 4\]; 3 features need"):
        features.read_statistics(file, 3)
    np.savez(file, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="not finite"):
        features.read_statistics(file, 3)


def test_folders_that_hold_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        features.picture_files(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no pictures"):
        features.picture_files(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.png cannot be read as a picture"):
        list(features.read_pictures(features.picture_files(tmp_path)))
