"""Computed cost models: what must follow from a model's shape and a GPU's data sheet, whatever the figures."""

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.planner import (
    Cluster,
    CostModel,
    Decoder,
    GroupKind,
    Problem,
    analytic_cluster,
    analytic_costs,
    named_problem,
    problem_of,
    published_cluster,
    published_costs,
    published_models,
)
from seqpar.planner.problem.models import DECODERS, GPUS, gpu_names, model_names

FULL = Decoder(32, 32, 4096, 32, 8, 128, 14_336, 128_256)
CLUSTER = analytic_cluster(64, "H100-80G")


def costs_of(model: Decoder, gpu: str = "H100-80G", cluster: Cluster = CLUSTER) -> dict[tuple[int, str], GroupKind]:
    return {(kind.degree, kind.transport): kind for kind in analytic_costs("m", model, gpu, cluster).kinds}


def degrees_of(model: Decoder, transport: str, cluster: Cluster = CLUSTER) -> set[int]:
    return {degree for degree, name in costs_of(model, cluster=cluster) if name == transport}


def test_linear_layers_have_no_square_and_a_message_that_does_not_grow() -> None:
    linear = costs_of(replace(FULL, softmax_layers=0))
    assert {transport for _, transport in linear} == {"none", "scan"}
    for (degree, _), kind in linear.items():
        assert kind.quadratic_seconds == kind.message_seconds == kind.hidden_seconds == 0
        assert kind.linear_seconds > 0
        assert (kind.latency_seconds > 0) == (degree > 1)
    state = 4 * 32 * 128**2  # a state of fp32 for each head goes over the wire, and more of it to more ranks
    more = costs_of(replace(FULL, softmax_layers=0, heads=64, hidden=8192))
    assert more[8, "scan"].latency_seconds > linear[8, "scan"].latency_seconds > 64 * state / 450e9


@given(st.integers(1, 31))
def test_hybrids_lie_between_and_in_proportion(softmax: int) -> None:
    full, linear = costs_of(FULL), costs_of(replace(FULL, softmax_layers=0))
    hybrid = costs_of(replace(FULL, softmax_layers=softmax))
    for (degree, transport), kind in hybrid.items():
        most, least = full[degree, transport], linear[degree, "scan" if degree > 1 else "none"]
        assert least.quadratic_seconds < kind.quadratic_seconds < most.quadratic_seconds
        for part in ("quadratic_seconds", "message_seconds", "hidden_seconds"):
            assert getattr(kind, part) == pytest.approx(getattr(most, part) * softmax / 32)
        assert kind.linear_seconds == most.linear_seconds
        if degree > 1:
            starts = (most.latency_seconds * softmax + least.latency_seconds * (32 - softmax)) / 32
            assert kind.latency_seconds == pytest.approx(starts)


def test_fewer_key_value_heads_send_less_and_compute_less() -> None:
    grouped, full = costs_of(FULL), costs_of(replace(FULL, key_value_heads=32))
    one = costs_of(replace(FULL, key_value_heads=1))
    for key, kind in grouped.items():
        assert kind.linear_seconds < full[key].linear_seconds  # smaller projections
        assert kind.quadratic_seconds == full[key].quadratic_seconds  # the same scores
        if key[1] == "ring":
            assert kind.message_seconds == pytest.approx(full[key].message_seconds / 4)
            assert one[key].message_seconds == pytest.approx(full[key].message_seconds / 32)
        elif key[1] == "all_to_all":
            assert kind.message_seconds == pytest.approx(full[key].message_seconds * (32 + 8) / (32 + 32))


@pytest.mark.parametrize("field", ["node_bytes_per_second", "network_bytes_per_second"])
def test_twice_the_bandwidth_halves_the_messages_it_carries(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    before = costs_of(FULL)
    row = GPUS["H100-80G"]
    faster = replace(row, **{field: 2 * getattr(row, field)})
    monkeypatch.setattr("seqpar.planner.problem.models.GPUS", MappingProxyType({**GPUS, "H100-80G": faster}))
    after = costs_of(FULL)
    for key, kind in before.items():
        carried = (key[0] <= 8) == (field == "node_bytes_per_second")
        assert after[key].message_seconds == pytest.approx(kind.message_seconds / (2 if carried else 1))
        assert replace(after[key], message_seconds=0.0) == replace(kind, message_seconds=0.0)


def test_twice_the_arithmetic_halves_computation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = costs_of(FULL)
    faster = replace(GPUS["H100-80G"], flops_per_second=2 * GPUS["H100-80G"].flops_per_second)
    monkeypatch.setattr("seqpar.planner.problem.models.GPUS", MappingProxyType({**GPUS, "H100-80G": faster}))
    for key, kind in costs_of(FULL).items():
        assert kind.quadratic_seconds == pytest.approx(before[key].quadratic_seconds / 2)
        assert kind.linear_seconds == pytest.approx(before[key].linear_seconds / 2)
        assert kind.hidden_seconds == pytest.approx(before[key].hidden_seconds / 2)
        assert (kind.message_seconds, kind.fixed_seconds) == (before[key].message_seconds, before[key].fixed_seconds)


def test_computation_is_cut_over_the_ranks_and_counts_the_causal_half() -> None:
    found = costs_of(FULL)
    alone = found[1, "none"]
    # 3 passes of 2 flops a multiply-add, over half of s^2 pairs, scores and values: 6 s^2 x layers x width.
    assert alone.quadratic_seconds == pytest.approx(6 * 32 * 4096 / (989e12 * 0.45))
    for (degree, _), kind in found.items():
        assert kind.quadratic_seconds == pytest.approx(alone.quadratic_seconds / degree)
        assert kind.linear_seconds == pytest.approx(alone.linear_seconds / degree)
        assert kind.fixed_seconds == alone.fixed_seconds
    assert alone.message_seconds == alone.hidden_seconds == alone.latency_seconds == 0


@pytest.mark.parametrize(("degree", "bandwidth"), [(2, 450e9), (4, 450e9), (8, 450e9), (16, 50e9), (32, 50e9)])
def test_messages_by_hand(degree: int, bandwidth: float) -> None:
    found = costs_of(FULL)
    # Forward and twice that backward, two bytes a value, of which a rank keeps its own share.
    once = 3 * 2 * 32 * (degree - 1) / degree / bandwidth
    queries_and_output, keys_and_values = 2 * 32 * 128, 2 * 8 * 128
    spread, ring = found[degree, "all_to_all"], found[degree, "ring"]
    assert spread.message_seconds == pytest.approx(once * (queries_and_output + keys_and_values) / degree)
    assert ring.message_seconds == pytest.approx(once * keys_and_values)
    assert ring.hidden_seconds == pytest.approx(ring.quadratic_seconds * (degree - 1) / degree)


def test_the_ring_hides_behind_long_documents_and_the_all_to_all_never() -> None:
    for (degree, transport), kind in costs_of(FULL).items():
        if transport == "ring":
            exposed_until = kind.message_seconds / kind.hidden_seconds
            assert kind.hidden_seconds < kind.quadratic_seconds
            assert 0 < exposed_until < 10_000_000
        else:
            assert kind.hidden_seconds == 0
        assert (kind.message_seconds > 0) == (degree > 1)


@pytest.mark.parametrize(
    ("heads", "devices", "node", "expected"),
    [(32, 64, 8, {2, 4, 8, 16, 32}), (24, 64, 8, {2, 3, 4, 6, 8, 24}), (12, 12, 6, {2, 3, 4, 6, 12}),
     (40, 16, 8, {2, 4, 5, 8}), (7, 16, 8, {7})],
)  # fmt: skip
def test_heads_that_are_no_power_of_two_give_degrees_that_are_none(
    heads: int, devices: int, node: int, expected: set[int]
) -> None:
    model = replace(FULL, heads=heads, hidden=heads * 128)
    cluster = analytic_cluster(devices, "H100-80G", node)
    assert degrees_of(model, "all_to_all", cluster) == expected
    for degree, _ in costs_of(model, cluster=cluster):
        assert cluster.stride(degree)
    assert expected <= degrees_of(model, "ring", cluster)
    assert degrees_of(replace(model, softmax_layers=0), "scan", cluster) >= expected


@settings(max_examples=30, derandomize=True)
@given(st.sampled_from(gpu_names()), st.sampled_from(model_names()), st.sampled_from([1, 2, 8, 16, 64, 256]))
def test_capacity_grows_with_the_devices_that_share_the_state(gpu: str, model: str, devices: int) -> None:
    def capacity(count: int) -> int:
        cluster = analytic_cluster(count, gpu)
        return Problem((1,), cluster, analytic_costs(model, DECODERS[model], gpu, cluster)).capacity

    assert 0 <= capacity(devices) <= capacity(2 * devices)
    most = (
        GPUS[gpu].memory_bytes / analytic_costs(model, DECODERS[model], gpu, analytic_cluster(8, gpu)).bytes_per_token
    )
    assert capacity(devices) < most


def test_capacity_falls_by_what_the_state_takes() -> None:
    cluster = Cluster("c", 8, 8, 1_000_000)
    one = GroupKind(1, "none", 0.0, 1e-3, 0.1)
    held = [Problem((1,), cluster, CostModel("c", (one,), 100.0, float(state))).capacity
            for state in (0, 100, 150, 500_000, 999_999, 1_000_000, 2_000_000)]  # fmt: skip
    assert held == [10_000, 9_999, 9_998, 5_000, 0, 0, 0]


def test_a_larger_model_has_more_parameters_and_more_state() -> None:
    assert DECODERS["llama-8b"].parameters == pytest.approx(8.03e9, rel=0.01)
    assert DECODERS["llama-70b"].parameters == pytest.approx(70.6e9, rel=0.01)
    assert DECODERS["llama-1b"].parameters == pytest.approx(1.5e9, rel=0.02)
    states = [analytic_costs(name, DECODERS[name], "H100-80G", CLUSTER).state_bytes for name in
              ("llama-1b", "llama-8b", "llama-70b")]  # fmt: skip
    assert states == sorted(states)
    assert states[1] == pytest.approx(DECODERS["llama-8b"].parameters * 16 / 64)


@pytest.mark.parametrize("name", published_models())
@pytest.mark.parametrize("devices", [1, 4, 8, 16, 64, 128])
def test_published_degrees_are_those_measured_that_have_a_place(name: str, devices: int) -> None:
    cluster = published_cluster(devices)
    found = published_costs(name, cluster)
    assert [kind.degree for kind in found.kinds] == [d for d in (1, 2, 4, 8, 16, 32, 64) if d <= devices]
    assert found.context_tokens == (192_000 if name.endswith("192k") else 384_000)
    assert found.state_bytes * devices == pytest.approx(published_costs(name, published_cluster(1)).state_bytes)


@pytest.mark.parametrize("name", ["gpt-7b", "gpt-13b"])
def test_a_published_model_without_a_context_is_that_of_384k(name: str) -> None:
    cluster = published_cluster()
    assert published_costs(name, cluster) == published_costs(f"{name}-384k", cluster)
    assert named_problem((5,), name, "64xA100-40G") == named_problem((5,), f"{name}-384k", "64xA100-40G")


@pytest.mark.parametrize("model", [*published_models(), *model_names()])
def test_every_name_is_a_problem(model: str) -> None:
    gpu = "A100-40G" if model in published_models() else "H200-141G"
    problem = named_problem((1000, 20), model, f"64x{gpu}")
    assert problem.capacity > 0
    assert problem.lengths == (1000, 20)
    assert problem.cluster.devices_per_node == 8
    assert problem.costs.name == model


@pytest.mark.parametrize(
    ("model", "cluster", "expected"),
    [
        ("gpt-9b", "64xA100-40G", "no model 'gpt-9b', did you mean 'gpt-7b'.; known are gpt-7b-192k"),
        ("gpt-7b-1m", "64xA100-40G", "no model 'gpt-7b-1m'"),
        ("gpt-7b-384k", "64xH100-80G", "was measured on A100-40G in nodes of 8, not H100-80G"),
        ("gpt-7b-384k", "12xA100-40G", "not of 6"),
        ("gpt-7b-384k", "64xA100-40G@10Gbit", "not with 10 Gbit/s"),
        ("gpt-7b", "64xA100", "GPU 'A100' may be A100-40G or A100-80G"),
        ("gpt-7", "64xA100-40G", "model 'gpt-7' may be gpt-7b-192k or gpt-7b-384k or gpt-7b"),
        ("llama-8b", "64xV100", "no GPU 'V100', did you mean 'A100-40G'|no GPU 'V100'; known are A100-40G"),
        ("llama-8b", "-8xH100-80G", "no cluster"),
        ("llama-8b", "64", "no cluster"),
        ("llama-8b", "", "no cluster"),
        ("llama-8b", "1e3xH100-80G", "no cluster"),
        ("llama-8b", "9999999xH100-80G", "no cluster"),
        ("llama-8b", "0xH100-80G", "no cluster"),
        ("llama-8b", "13xH100-80G", "not whole nodes of 8, 7, 6, 5 or 4: .* such as 13x1xH100-80G"),
        ("llama-8b", "0x8xH100-80G", "no cluster"),
        ("llama-8b", "2x8xH100-80G@0Gbit", "more than 0 Gbit/s"),
        ("llama-8b", "2x8xH100-80G@fast", "no cluster"),
        ("llama-8b", "999999x999999xH100-80G", "expected at most 999,999"),
        ("llama-8b", f"{'9' * 400}xH100-80G", "no cluster '9{60}...'"),
        ("x" * 100_000, "8xH100-80G", "no model 'x{60}...'"),
        ("", "8xH100-80G", "no model ''"),
    ],
)
def test_names_that_are_not_known_are_answered_with_those_that_are(model: str, cluster: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        named_problem((5,), model, cluster)


def test_gpus_that_are_not_known_are_refused_here_too() -> None:
    for ask in (lambda: analytic_cluster(8, "V100"), lambda: analytic_costs("m", FULL, "V100", CLUSTER)):
        with pytest.raises(ValueError, match="no GPU 'V100'; known are A100-40G"):
            ask()
    with pytest.raises(ValueError, match="measured on 64xA100-40G"):
        published_costs("gpt-7b-384k", CLUSTER)
    with pytest.raises(ValueError, match="no published model 'gpt-7b-'"):
        published_costs("gpt-7b-", published_cluster())


def test_kinds_without_a_place_are_left_out_of_a_problem_and_the_others_sorted() -> None:
    kinds = tuple(GroupKind(degree, "ring", 0.0, 1e-3, 0.1) for degree in (8, 3, 1, 6, 2, 16))
    costs = CostModel("c", kinds, 1.0, 0.0, 77)
    found = problem_of([4, 5], Cluster("c", 8, 4, 100), costs)
    assert [kind.degree for kind in found.costs.kinds] == [1, 2, 3, 8]
    assert (found.costs.name, found.costs.context_tokens, found.lengths) == ("c", 77, (4, 5))
    with pytest.raises(ValueError, match="degree 6 fits no place on c"):
        Problem((1,), Cluster("c", 8, 4, 100), costs)


@pytest.mark.parametrize(
    ("devices", "node", "strides"),
    [(8, 4, [1, 2, 1, 4, 0, 0, 0, 8]), (6, 6, [1, 2, 3, 2, 1, 6]), (12, 6, [1, 2, 3, 2, 1, 6, 0, 0, 0, 0, 0, 12]),
     (12, 3, [1, 1, 3, 0, 0, 6, 0, 0, 3, 0, 0, 12])],
)  # fmt: skip
def test_strides_by_hand(devices: int, node: int, strides: list[int]) -> None:
    cluster = Cluster("c", devices, node, 1)
    assert [cluster.stride(degree) for degree in range(1, devices + 1)] == strides
    assert cluster.stride(devices + 1) == 0
