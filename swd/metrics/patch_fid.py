"""Patch FID: the Fréchet distance of crops at full resolution, which FID's resize hides."""

from __future__ import annotations

from swd.metrics.fid import Frechet
from swd.metrics.inception import SIDE, InceptionFeatures
from swd.metrics.preparation import CentreCrop


def patch_fid(path: str | None, side: int = SIDE, seed: int = 0) -> Frechet:
    """FID of a crop around the middle of each picture, drawn and real, without a resize before it.

    The paper gives patch FID in its Table 10 but neither the crops' size nor their number. The default is the protocol
    of SDXL-Lightning (arXiv 2402.13929, section 5): one crop of 299 x 299, the input of the network. Real pictures must
    have the drawn ones' resolution, or the scale of details differs.

    Args:
        path: of the Inception network, as in `InceptionFeatures`.
        side: of the crops, in pixels; other than 299 they are then resized by the network's own bilinear resize.
        seed: as in `Frechet`.
    """
    return Frechet(InceptionFeatures(path, [CentreCrop(side)]), "patch_fid", seed)
