"""Swap plans made: one by ``plan_swap``, one for each strategy by ``compare``; each is recomputed by its checker."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from seqpar.offload.planning.plan import SwapPlan
from seqpar.offload.planning.profile import LayerProfile, Machine, at_length, bucket
from seqpar.offload.planning.strategies import STRATEGIES, alpha, choose, hides_from_tokens, predict
from seqpar.offload.planning.swap_check import check_swap_plan


@dataclass(frozen=True)
class Compared:
    """One strategy: its plan, or why there is none."""

    strategy: str
    plan: SwapPlan | None
    refused: str = ""


def plan_swap(profile: LayerProfile, machine: Machine, strategy: str = "auto") -> SwapPlan:
    """The plan of one strategy, checked.

    ``"keep"`` keeps all; ``"recompute"`` keeps the layer's input (the first saved tensor) and computes the layer
    again; ``"input_only"`` swaps that input and computes again; ``"memo"`` swaps the layer input, the attention
    output and a uniform share of all else; ``"auto"`` chooses shares for each tensor by a linear program. Raises
    ``ValueError`` where host or device cannot hold it, with what is missing, and for ``"auto"`` without a solver.
    """
    fractions = choose(profile, machine, strategy)
    predicted = predict(profile, machine, strategy, fractions)
    plan = SwapPlan(
        strategy=strategy,
        tokens=profile.tokens,
        context_tokens=profile.context,
        layers=profile.layers,
        fractions=tuple((tensor.name, shares) for tensor, shares in zip(profile.saved, fractions)),
        alpha=alpha(profile, machine) if strategy == "memo" else None,
        saved_bytes_per_layer=math.ceil(profile.layer_bytes),
        device_peak_bytes=predicted.device_peak_bytes,
        host_peak_bytes=predicted.host_peak_bytes,
        recompute_seconds=predicted.recompute_seconds,
        exposed_seconds=predicted.exposed_seconds,
        step_seconds=predicted.step_seconds,
        hides_from_tokens=hides_from_tokens(profile, machine, strategy),
        binds=predicted.binds,
    )
    check_swap_plan(plan, profile, machine)
    return plan


def compare(profile: LayerProfile, machine: Machine) -> tuple[Compared, ...]:
    """Every strategy with its plan, or with the reason why it has none."""
    return tuple(_compared(profile, machine, strategy) for strategy in STRATEGIES)


def plans_by_bucket(
    profile: LayerProfile, machine: Machine, lengths: Iterable[int], strategy: str = "auto"
) -> dict[int, SwapPlan]:
    """A plan for the bucket of each length (tokens of this device), made at the bucket's upper end."""
    return {
        tokens: plan_swap(at_length(profile, tokens), machine, strategy)
        for tokens in sorted({bucket(length) for length in lengths})
    }


def _compared(profile: LayerProfile, machine: Machine, strategy: str) -> Compared:
    try:
        return Compared(strategy, plan_swap(profile, machine, strategy))
    except ValueError as error:
        return Compared(strategy, None, str(error))
