"""Models and clusters by name."""

import re

from seqpar.planner.problem.models import DECODERS, analytic_cluster, analytic_costs, gpu_names, model_names
from seqpar.planner.problem.problem import Problem, problem_of
from seqpar.planner.problem.published import published_cluster, published_costs, published_models

_CLUSTER = re.compile(r"(\d{1,6})x([A-Za-z0-9.-]+)")
_PUBLISHED_GPU = "A100-40G"


def named_problem(lengths: tuple[int, ...], model: str, cluster: str) -> Problem:
    """The problem of these documents for a model and a cluster (``64xA100-40G``) that are known by name.

    Published models go with A100-40G only, where they were measured; all others are computed from their shape.
    """
    devices, gpu = _cluster(cluster)
    if model in published_models() or model in {name.rpartition("-")[0] for name in published_models()}:
        if gpu != _PUBLISHED_GPU:
            others = ", ".join(model_names())
            raise ValueError(f"{model} was measured on {_PUBLISHED_GPU}: give a cluster of those, or one of {others}")
        place = published_cluster(devices)
        return problem_of(lengths, place, published_costs(model, place))
    if model not in model_names():
        raise ValueError(f"no model {model!r}; known are {', '.join((*published_models(), *model_names()))}")
    place = analytic_cluster(devices, gpu)
    return problem_of(lengths, place, analytic_costs(model, DECODERS[model], gpu, place))


def _cluster(name: str) -> tuple[int, str]:
    match = _CLUSTER.fullmatch(name)
    if match is None or match[2] not in gpu_names() or int(match[1]) < 1:
        gpus = ", ".join(gpu_names())
        raise ValueError(
            f"no cluster {name!r}; expected devices x GPU, such as 64x{_PUBLISHED_GPU}, with one of {gpus}"
        )
    devices = int(match[1])
    if devices > 8 and devices % 8:
        raise ValueError(f"cluster {name!r}: {devices} devices are not whole nodes of 8")
    return devices, match[2]
