"""Mamba (arXiv 2312.00752): Mamba, Falcon-Mamba, and the layers of Jamba and Zamba."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family


def scan(
    here: Here,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Tensor | tuple[Tensor, None]:
    """``hidden_states, dt, z [b, d, t]``, ``A [d, n]``, ``B, C [b, n, t]``, ``D, delta_bias [d]``."""
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = functional.softplus(dt) if delta_softplus else dt
    inputs = [x.transpose(1, 2).to(A.dtype) for x in (hidden_states, dt, B, C)]
    u, delta, b, c = inputs
    out = here.selective_scan(u, delta, A, b, c).transpose(1, 2)
    out = out if D is None else out + hidden_states * D[None, :, None]
    out = (out if z is None else out * functional.silu(z)).to(hidden_states.dtype)
    return (out, None) if return_last_state else out


def not_fused(here: Here, *fused: Tensor) -> None:
    """A kernel that does all of a layer at once says that it is not there."""


FAMILY = Family(MappingProxyType({"mamba_selective_scan": scan, "mamba_inner_fn": not_fused}))
