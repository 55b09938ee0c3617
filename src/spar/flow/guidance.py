"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on velocities: v_u + scale (v_c - v_u)."""

from torch import Tensor

from spar.common.checks import check_pair


def apply_guidance(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """The guided velocity; both branches have one shape.

    Scale 1 returns the conditional tensor itself, and then the unconditional branch need not exist: a caller may skip
    its computation. Scale 0 is the unconditional branch.
    """
    if scale == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"expected an unconditional branch for guidance scale {scale}, got None")
    check_pair("the conditional branch", conditional, "the unconditional branch", unconditional)
    return unconditional + scale * (conditional - unconditional)
