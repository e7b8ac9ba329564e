"""Autocast around a layer: every row runs under it, no sum over tokens is kept in 16 bits, and nothing is less exact
than with weights and inputs in 16 bits."""

import copy

import pytest
import torch
from torch import Tensor

from seqpar import Cut
from seqpar.crossing import recurrences
from seqpar.layers.catalog import CATALOG
from seqpar.ops.precision import no_autocast
from seqpar.sharding.states import States
from tests.layers.rows import ROWS, listed
from tests.layers.test_battery import inputs_of, layer_of, typical_error

LENGTHS = (5, 0, 1, 9)
HALVES = (torch.bfloat16, torch.float16)
FP32 = ("log_a", "dt_bias", "log_rate", "frequency", "log_step", "decay", "forget_bias", "theta")
TOKENS_KEPT = ("conv", "shift", "preceding", "keys and values")  # rows of tokens as they came, not sums of them


def outcome(name: str, inputs: torch.dtype, weights: torch.dtype, autocast: torch.dtype | None) -> dict[str, Tensor]:
    layer, (x, upstream) = copy.deepcopy(layer_of(name)).to(weights), inputs_of(name, sum(LENGTHS))
    x = x.to(inputs, copy=True).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x, Cut.whole(LENGTHS))
    y.backward(upstream.to(y.dtype))
    assert x.grad is not None
    return {"output": y.detach().double(), "input": x.grad.double()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", listed(ROWS))
def test_every_row_runs_under_autocast(name: str, dtype: torch.dtype) -> None:
    exact = outcome(name, torch.float64, torch.float64, None)
    ours, half = outcome(name, torch.float32, torch.float32, dtype), outcome(name, dtype, dtype, None)
    for part, theirs in exact.items():
        assert ours[part].isfinite().all()
        assert typical_error(ours[part], theirs) <= 1.5 * typical_error(half[part], theirs) + 1e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", listed(name for name in ROWS if CATALOG[ROWS[name].entry].causal))
def test_states_are_fp32_under_autocast(name: str, dtype: torch.dtype) -> None:
    layer, states = copy.deepcopy(layer_of(name)).float(), States()
    with torch.autocast("cpu", dtype), torch.no_grad():
        layer(inputs_of(name, 9)[0].float(), Cut.whole([9], states))
    kept = {key: state.dtype for (_, key), state in states.leaving.items() if key not in TOKENS_KEPT}
    assert all(each in (torch.float32, torch.complex64) for each in kept.values()), kept


@pytest.mark.parametrize("inside", (False, True))
def test_autocast_reaches_no_recurrence(inside: bool) -> None:
    """Bit for bit, and in backward too, wherever that is called."""
    inputs = [torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    cut, found = Cut.whole([9]), []
    for dtype in (None, torch.bfloat16):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = recurrences.linear_attention(q, k, v, shard=cut.shard, group=cut.group)
            with torch.autocast("cpu", dtype, enabled=inside and dtype is not None):
                found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", listed(ROWS))
def test_rates_steps_and_frequencies_stay_fp32(name: str, dtype: torch.dtype) -> None:
    before, after = (copy.deepcopy(layer_of(name)).float() for _ in range(2))
    for parameter in after.parameters():
        parameter.grad = torch.ones_like(parameter)
    after = after.to(dtype)
    assert list(after.state_dict()) == list(before.state_dict())
    for (key, theirs), (also, ours) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        owner, _, last = key.rpartition(".")
        declared = last in getattr(before.get_submodule(owner), "fp32", ())
        assert key == also and (declared or last not in FP32)
        assert ours.dtype == (torch.float32 if declared else dtype)
        assert ours.grad is not None and ours.grad.dtype == ours.dtype
        assert not declared or torch.equal(ours, theirs)


def test_no_autocast_without_a_tensor_does_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16), no_autocast("bthk", 3):
        assert torch.is_autocast_enabled("cpu")
        with no_autocast("bthk", torch.ones(1)):
            assert not torch.is_autocast_enabled("cpu")
