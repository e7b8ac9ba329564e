"""Models and clusters by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from seqpar.planner.problem.explain import reasons
from seqpar.planner.problem.models import DECODERS, analytic_cluster, analytic_costs, gpu_names, model_names
from seqpar.planner.problem.problem import Problem, problem_of
from seqpar.planner.problem.published import (
    CONTEXT,
    DEVICES_PER_NODE,
    GPU,
    published_cluster,
    published_costs,
    published_models,
    published_shape,
)
from seqpar.planner.problem.words import pick, shortened

_CLUSTER = re.compile(
    r"(?:(\d{1,6})x)?(\d{1,6})x([a-z][\w.-]*)(?:@(\d{1,6}(?:\.\d{1,3})?)gbit)?", re.ASCII | re.IGNORECASE
)
_EXPECTED = "devices x GPU or nodes x devices x GPU, and @Gbit/s between nodes, such as 64xH100-80G or 3x4xH100@200Gbit"
_NODE = 8
_MOST_DEVICES = 999_999
_BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Named:
    """A cluster by name: so many devices of a GPU, and what one of them sends to other nodes, if that is said."""

    devices: int
    devices_per_node: int
    gpu: str
    gbit_per_second: float | None = None

    @property
    def name(self) -> str:
        """The canonical name, without nodes where they are those of 8."""
        whole = self.devices_per_node == min(_NODE, self.devices)
        nodes = "" if whole else f"{self.devices // self.devices_per_node}x"
        speed = "" if self.gbit_per_second is None else f"@{self.gbit_per_second:.10g}Gbit"
        return f"{nodes}{self.devices if whole else self.devices_per_node}x{self.gpu}{speed}"


def named_problem(lengths: tuple[int, ...], model: str, cluster: str) -> Problem:
    """The problem of these documents for a model and a cluster that are known by name, in any case.

    A cluster is ``64xH100-80G``, nodes of 8 or one smaller node; ``3x4xH100-80G``, 3 nodes of 4; and
    ``3x4xH100-80G@200Gbit``, where a device sends 200 Gbit/s to other nodes. Devices beyond 8 that are no whole nodes
    of 8 are taken for nodes of 7, 6, 5 or 4. A GPU's name may be as short as tells it from the others.

    Published models go with nodes of 8 A100-40G only, where they were measured; without a context (``gpt-7b``) they are
    computed from their shape on every other cluster, as all others are everywhere.
    """
    return _problem(lengths, pick("model", model, (*published_models(), *model_names())), named_cluster(cluster))


def named_cluster(name: str) -> Named:
    """What the name of a cluster says; raises ``ValueError`` for one that is none."""
    match = _CLUSTER.fullmatch(name.strip())
    if match is None or int(match[2]) < 1 or int(match[1] or 1) < 1:
        raise ValueError(f"no cluster {shortened(name)}: expected {_EXPECTED}, with one of {', '.join(gpu_names())}")
    gpu, gbit = pick("GPU", match[3], gpu_names()), None if match[4] is None else float(match[4])
    if gbit == 0:
        raise ValueError(f"cluster {shortened(name)}: expected more than 0 Gbit/s between nodes")
    if match[1] is None:
        return Named(int(match[2]), _node_of(int(match[2]), gpu), gpu, gbit)
    devices = int(match[1]) * int(match[2])
    if devices > _MOST_DEVICES:
        raise ValueError(f"cluster {shortened(name)}: {devices:,} devices, expected at most {_MOST_DEVICES:,}")
    return Named(devices, int(match[2]), gpu, gbit)


def smallest_cluster(lengths: tuple[int, ...], model: str, cluster: str) -> str | None:
    """The name of the smallest cluster of the same GPUs, in whole nodes of the same size (or a part of one), in which
    these documents fit; None if they fit in none.

    More devices share the model's state, so each has more room: the cost model is asked at every count that is tried.
    """
    model, named = pick("model", model, (*published_models(), *model_names())), named_cluster(cluster)
    node = max(named.devices, _NODE) if named.devices == named.devices_per_node else named.devices_per_node
    longest = (max(lengths),)

    def at(step: int) -> Named:
        devices = step if step <= node else (step - node + 1) * node
        return replace(named, devices=devices, devices_per_node=min(devices, node))

    found = _first(lambda step: _fits(longest, model, at(step)), node + _MOST_DEVICES // node - 1)
    return None if found is None else at(found).name


def _first(fits: Callable[[int], bool], most: int) -> int | None:
    """The first number from 1 on that fits, where all beyond it do; None if ``most`` does not."""
    low, high = 0, most
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _fits(lengths: tuple[int, ...], model: str, named: Named) -> bool:
    try:
        return not reasons(_problem(lengths, model, named))
    except ValueError:  # no kind of group has a place
        return False


def _problem(lengths: tuple[int, ...], model: str, named: Named) -> Problem:
    if model in published_models() or _was_measured(model, named):
        if why := _not_measured(named):
            raise ValueError(f"{model} was measured on {GPU} in nodes of {DEVICES_PER_NODE}, not {why}: give a cluster "
                             f"of those, or one of {', '.join(model_names())}")  # fmt: skip
        place = published_cluster(named.devices)
        return problem_of(lengths, place, published_costs(model, place))
    place = replace(analytic_cluster(named.devices, named.gpu, named.devices_per_node), name=named.name)
    speed = None if named.gbit_per_second is None else named.gbit_per_second * _BYTES_PER_GBIT
    return problem_of(lengths, place, analytic_costs(model, DECODERS[model], named.gpu, place, speed))


def _was_measured(model: str, named: Named) -> bool:
    """Whether a model of this very shape was measured on such a cluster."""
    shape, published = DECODERS[model], f"{model}-{CONTEXT}"
    alike = published in published_models() and published_shape(published) == (shape.layers, shape.hidden)
    return alike and not _not_measured(named)


def _not_measured(named: Named) -> str:
    if named.gpu != GPU:
        return named.gpu
    if named.devices_per_node != min(DEVICES_PER_NODE, named.devices):
        return f"of {named.devices_per_node}"
    return "" if named.gbit_per_second is None else f"with {named.gbit_per_second:g} Gbit/s between them"


def _node_of(devices: int, gpu: str) -> int:
    """Devices of a node where nothing is said: 8, or the most below that of which all nodes are whole."""
    if devices <= _NODE:
        return devices
    found = next((node for node in range(_NODE, _NODE // 2 - 1, -1) if devices % node == 0), None)
    if found is None:
        raise ValueError(f"{devices} devices are not whole nodes of 8, 7, 6, 5 or 4: say how they stand, such as "
                         f"{devices}x1x{gpu} for {devices} nodes of one")  # fmt: skip
    return found
