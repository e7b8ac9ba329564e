"""The constants that FlexSP published, by name: gpt-7b, gpt-13b and gpt-30b on 64 A100 of 40 GB.

Source: arXiv 2412.01523 and its released solver (PKU-DAIR/Hetu-Galvatron, branch flexsp, Apache-2.0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from seqpar.planner.problem.problem import ALL_TO_ALL, Cluster, CostModel, GroupKind

MIB = 2**20
GIB = 2**30
_CONTEXTS: Mapping[str, int] = MappingProxyType({"192k": 192_000, "384k": 384_000})
CONTEXT = "384k"  # of a name without one
GPU = "A100-40G"
DEVICES_PER_NODE = 8
_BUDGET_BYTES = 30 * GIB
_STATE_BYTES_PER_PARAMETER = 16
_MESSAGE_BYTES_PER_UNIT = 16  # per layer, hidden unit and token: four all-to-alls of two bytes, forward and backward


@dataclass(frozen=True)
class PublishedModel:
    """One row of the published table, in its own units: MB per token, ms, and parameters in units of 2**30."""

    megabytes_per_token: float
    quadratic_ms: float
    linear_ms: float
    fixed_ms: float
    hidden: int
    layers: int
    parameters: Mapping[str, float]


_MODELS: Mapping[str, PublishedModel] = MappingProxyType(
    {
        "gpt-7b": PublishedModel(
            4.480441895, 5.128e-6, 0.1839576, 629.3563, 4096, 32, {"192k": 7.11745, "384k": 7.84987}
        ),
        "gpt-13b": PublishedModel(
            4.220439453, 9.2852e-6, 0.3060189, 1132.5632, 5120, 40, {"192k": 13.11605, "384k": 14.03158}
        ),
        "gpt-30b": PublishedModel(
            3.417381836, 15.4262e-6, 0.8035742, 2789.3644, 6656, 60, {"192k": 31.52514, "384k": 32.71532}
        ),
    }
)
_GIGABYTES_PER_SECOND: Mapping[int, float] = MappingProxyType(
    {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
)


def published_models() -> tuple[str, ...]:
    """The names that ``published_costs`` knows: a model and the longest context it was measured for."""
    return tuple(f"{model}-{context}" for model in _MODELS for context in _CONTEXTS)


def published_shape(name: str) -> tuple[int, int]:
    """Layers and width of a published model."""
    row = _MODELS[name.rpartition("-")[0]]
    return row.layers, row.hidden


def published_cluster(devices: int = 64) -> Cluster:
    """So many A100 of 40 GB, 8 a node, 30 GB of each to be planned with."""
    return Cluster(f"{devices}x{GPU}", devices, min(DEVICES_PER_NODE, devices), _BUDGET_BYTES)


def published_costs(name: str, cluster: Cluster) -> CostModel:
    """The published cost model of this name (``gpt-7b-384k``; without a context, 384k) on a cluster of A100-40G.

    The degrees are the measured ones, up to 64. Times are ``(a2 s^2 + a1 s) / d + b`` and, for the all-to-alls,
    ``16 * layers * hidden * s`` bytes over degree and measured bandwidth; the state is cut over all devices.
    """
    model, _, context = name.rpartition("-")
    if name in _MODELS:
        model, context = name, CONTEXT
    if model not in _MODELS or context not in _CONTEXTS:
        raise ValueError(f"no published model {name!r}; known are {', '.join(published_models())}")
    if not cluster.name.endswith(f"x{GPU}"):
        raise ValueError(
            f"{name} was measured on 64x{GPU}: give a cluster Nx{GPU}, or a model that is computed from its shape"
        )
    row = _MODELS[model]
    degrees = [degree for degree in (1, *_GIGABYTES_PER_SECOND) if cluster.stride(degree)]
    return CostModel(
        name=f"{model}-{context}",
        kinds=tuple(_kind(row, degree) for degree in degrees),
        bytes_per_token=row.megabytes_per_token * MIB,
        state_bytes=row.parameters[context] * GIB * _STATE_BYTES_PER_PARAMETER / cluster.devices,
        context_tokens=_CONTEXTS[context],
    )


def _kind(row: PublishedModel, degree: int) -> GroupKind:
    message_ms = 0.0
    if degree > 1:
        megabytes = _MESSAGE_BYTES_PER_UNIT * row.layers * row.hidden / MIB / degree
        message_ms = megabytes / _GIGABYTES_PER_SECOND[degree]
    return GroupKind(
        degree=degree,
        transport=ALL_TO_ALL if degree > 1 else "none",
        quadratic_seconds=row.quadratic_ms / degree / 1e3,
        linear_seconds=row.linear_ms / degree / 1e3,
        fixed_seconds=row.fixed_ms / 1e3,
        message_seconds=message_ms / 1e3,
    )
