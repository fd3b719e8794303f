"""The teacher's scales of classifier-free guidance, from the keys that configurations have or had."""

from __future__ import annotations

from swd.io import limits
from swd.types import UserError

DMD_GUIDANCE, DRAWING_GUIDANCE = 7.0, 4.5
"""Stable Diffusion 3.5 Medium's: of DMD in the released script, of the training set in the paper's appendix A."""


def guidance_scales(dmd: float | None, drawing: float | None, both: float | None) -> tuple[float, float]:
    """The guidance of DMD and that of drawing, from the two keys and the one that runs of earlier versions have.

    Raises:
        UserError: for a scale that cannot be used, or all three at once.
    """
    for key, scale, least in (("dmd", dmd, 0.0), ("drawing", drawing, 1.0), ("", both, 0.0)):
        limits.number(f"model.{key}{key and '_'}guidance_scale", scale, least, limits.GUIDANCE, "1 for none")
    if both is None:
        return DMD_GUIDANCE if dmd is None else float(dmd), DRAWING_GUIDANCE if drawing is None else float(drawing)
    if dmd is not None and drawing is not None:
        raise UserError(
            f"model.guidance_scale={both} is two keys now, model.dmd_guidance_scale={dmd} for the teacher in DMD and "
            f"model.drawing_guidance_scale={drawing} for what it draws; set these and leave guidance_scale out"
        )
    # Below 1 pipelines drew without guidance.
    return float(both if dmd is None else dmd), float(max(both, 1.0) if drawing is None else drawing)
