"""Shared parts of the tests against stored numbers of the released code."""

from __future__ import annotations

from conftest import Golden

from swd.losses.gan_head import GANHead

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def load_head(golden: Golden, prefix: str, width: int) -> GANHead:
    """The stored discriminator head in our module."""
    head = GANHead(width)
    head.load_state_dict({"layers." + n.removeprefix(prefix): golden[n] for n in golden.names(prefix)})
    return head
