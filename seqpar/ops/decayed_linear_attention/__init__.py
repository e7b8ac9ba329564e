"""Decayed linear attention on one device, in stages, so that a scan over ranks can travel while it works."""

from seqpar.ops.decayed_linear_attention.reference import (
    Adjoint,
    IntraGradients,
    Run,
    begin,
    begin_backward,
    finish,
    finish_backward,
    intra,
    intra_backward,
)

__all__ = [
    "Adjoint",
    "IntraGradients",
    "Run",
    "begin",
    "begin_backward",
    "finish",
    "finish_backward",
    "intra",
    "intra_backward",
]
