"""The teacher's scales of classifier-free guidance, from the keys of present and of earlier configurations."""

from __future__ import annotations

from swd.io import limits
from swd.types import UserError

DMD_GUIDANCE = 7.0
"""Guidance of the teacher in DMD for Stable Diffusion 3.5 Medium (released script)."""
DRAWING_GUIDANCE = 4.5
"""Guidance with which Stable Diffusion 3.5 drew the training set (SwD paper, appendix A)."""


def guidance_scales(dmd: float | None, drawing: float | None, both: float | None) -> tuple[float, float]:
    """The guidance scales of the teacher in DMD and when it draws.

    Args:
        dmd, drawing: `model.dmd_guidance_scale` and `model.drawing_guidance_scale`, None where not given.
        both: `model.guidance_scale` of runs of earlier versions, used for a scale that is not given.

    Raises:
        UserError: for a scale that cannot be used, or all three at once.
    """
    for key, scale, least in (("dmd", dmd, 0.0), ("drawing", drawing, 1.0), ("", both, 0.0)):
        limits.number(f"model.{key}{key and '_'}guidance_scale", scale, least, limits.GUIDANCE, limits.NO_GUIDANCE)
    if both is None:
        return DMD_GUIDANCE if dmd is None else float(dmd), DRAWING_GUIDANCE if drawing is None else float(drawing)
    if dmd is not None and drawing is not None:
        raise UserError(
            f"model.guidance_scale={both} is two keys now, model.dmd_guidance_scale={dmd} for the teacher in DMD and "
            f"model.drawing_guidance_scale={drawing} for what it draws; set these and leave guidance_scale out"
        )
    # Earlier versions drew without guidance at scales below 1.
    return float(both if dmd is None else dmd), float(max(both, 1.0) if drawing is None else drawing)
