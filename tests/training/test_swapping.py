"""The decorator's ``swap=``: the same bits, plans from the first step, and what is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqpar import run_plan, sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.collectives.c10d import ProcessRanks
from seqpar.models import HybridConfig, HybridLM
from seqpar.offload.planning.profile import bucket
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.planning.swap_check import check_swap_plan
from seqpar.offload.runtime.file_tier import FileTier
from seqpar.offload.runtime.tiers import HostTier
from seqpar.training import swapping
from seqpar.training.swapping import Swapping, measure
from tests.plans import any_plan

CONFIG = HybridConfig(vocabulary=50, dim=64, layers=4, heads=4, softmax_every=2)
with torch.random.fork_rng():
    torch.manual_seed(0)  # the same weights in every process
    MODEL = HybridLM(CONFIG).double()
LENGTHS = [150, 1, 211, 90]
SWAP = Fractions(0.0, 1.0, 0.0)
HALF = Fractions(0.5, 0.5, 0.0)


def wrapped(group, **options):
    return sequence_parallel(copy.deepcopy(MODEL), group=group, **options)


def tokens_of(seed=0):
    return torch.randint(50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


def step(model, seed=0):
    """Loss and gradients of one step."""
    model.zero_grad()
    tokens = tokens_of(seed)
    loss = model(tokens, labels=tokens, lengths=LENGTHS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def same(found, expected):
    return all(map(torch.equal, found, expected))


@pytest.mark.sampled(3)
@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ten_steps_with_swapping_are_the_same_bits(group, layout):
    plain, swapped = wrapped(group, layout=layout), wrapped(group, layout=layout, swap=HALF)
    for seed in (0, 1, 9):
        assert same(step(swapped, seed), step(plain, seed))
    assert swapped.swap._swaps[0].saved, "nothing was swapped"
    swapped.swap.close()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_file_tier_of_every_rank(tmp_path, checkpoint):
    model = HybridLM(HybridConfig(**{**vars(CONFIG), "checkpoint": checkpoint})).double()

    def body(group):
        tier = FileTier(tmp_path, checksum=True)
        plain = sequence_parallel(copy.deepcopy(model), group=group)
        swapped = sequence_parallel(copy.deepcopy(model), group=group, swap=SWAP, swap_tier=tier)
        found = [same(step(swapped, seed), step(plain, seed)) for seed in (0, 1)]
        used = tier.size
        swapped.swap.close()
        return all(found) and used > 0

    assert run_ranks(2, body) == [True, True]


@pytest.mark.spmd(1, 2)
def test_auto_plans_from_the_first_step_of_each_length(group):
    """What is computed again differs in the last bits where matrix kernels block their rows differently."""
    plain, swapped = wrapped(group), wrapped(group, swap="auto")
    for seed in (0, 1, 2):
        for got, expected in zip(step(swapped, seed), step(plain, seed)):
            assert (got - expected).norm() <= 1e-12 * expected.norm()
    (plan,) = swapped.swap.plans.values()
    assert plan.tokens == bucket(-(-sum(LENGTHS) // group.size)) and plan.layers == 4
    assert {"layer_input"} <= {name for name, _ in plan.fractions}
    for name, shares in plan.fractions:
        assert shares.keep + shares.swap + shares.recompute == pytest.approx(1.0)
        assert "." in name or shares.recompute == 0, "what mixes tokens is never computed again"
    swapped.swap.close()


def test_auto_makes_a_plan_for_each_bucket_and_keeps_it():
    model = wrapped(alone(), swap="auto")
    for length in (200, 200, 130, 201):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        model(tokens, labels=tokens).loss.backward()
    assert len(model.swap.plans) == 2
    plans = dict(model.swap.plans)
    tokens = torch.zeros(1, 200, dtype=torch.int64)
    model(tokens, labels=tokens).loss.backward()
    assert model.swap.plans == plans


def test_the_plan_of_auto_fits_what_was_measured():
    model = wrapped(alone(), swap="auto")
    step(model)
    (plan,) = model.swap.plans.values()
    saved = sum(each.swapped_bytes + each.kept_bytes for each in model.swap._observed)
    longest = saved / 3 * plan.tokens / sum(LENGTHS)
    assert plan.saved_bytes_per_layer == pytest.approx(longest, rel=0.01), "the last of four layers stays"
    assert plan.tokens == bucket(sum(LENGTHS)) > sum(LENGTHS), "a plan is for the longest batch of its bucket"
    profile, machine = model.swap.measured[next(iter(model.swap.plans))]
    check_swap_plan(plan, profile, machine)
    assert profile.forward_seconds > 0 and machine.d2h_bytes_per_second > 0


def test_auto_swaps_and_computes_again_where_the_device_is_small(monkeypatch):
    """As much memory as the state and three and a half of four layers; the plan is followed from the second step on."""
    first = wrapped(alone(), swap="auto")
    step(first)
    ((profile, _),) = first.swap.measured.values()
    room = profile.resident_bytes + 3.5 * profile.layer_bytes
    monkeypatch.setattr(swapping, "usable_bytes", lambda device, sharing: int(room))
    model, plain = wrapped(alone(), swap="auto"), wrapped(alone())
    for seed in (0, 1, 2):
        for got, expected in zip(step(model, seed), step(plain, seed)):
            assert (got - expected).norm() <= 1e-12 * expected.norm()
    (plan,) = model.swap.plans.values()
    assert any(shares.keep < 1 for _, shares in plan.fractions), plan
    gone = sum(each.swapped_bytes + each.recomputed_bytes for each in model.swap._swaps[plan.tokens].saved)
    assert gone > 0, "the plan was not followed"


def test_ranks_of_one_host_share_its_memory():
    shares = [wrapped(group, swap="auto").swap for group in (alone(), *run_ranks(4, lambda group: group))]
    machines = [swap._machine() for swap in shares[:2]]
    assert [machine.devices_per_host for machine in machines] == [1, 4]
    assert machines[1].device_bytes == pytest.approx(machines[0].device_bytes / 4, rel=1e-6)


def test_without_gradients_nothing_leaves():
    model = wrapped(alone(), swap="auto")
    with torch.no_grad():
        tokens = tokens_of()
        assert model(tokens, labels=tokens, lengths=LENGTHS).loss is not None
    assert not model.swap.plans and model.swap._tier.size == 0


@pytest.mark.spmd(3)
def test_planned_steps_swap_too(group):
    tokens, found = tokens_of(), []
    for swap in (None, SWAP):
        model = wrapped(group, swap=swap)
        run_plan(model, any_plan(LENGTHS, group.size, 3), tokens, labels=tokens, lengths=LENGTHS)
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


def test_a_copy_of_a_model_swaps_its_own_activations():
    model = wrapped(alone(), swap=SWAP)
    twin = copy.deepcopy(model)
    assert same(step(twin), step(model))
    assert twin.swap is not model.swap and twin.swap._module is twin.module


@pytest.mark.parametrize("tier", ["host", "file"])
def test_bandwidth_is_measured_both_ways_and_gives_its_room_back(tmp_path, tier):
    store = HostTier() if tier == "host" else FileTier(tmp_path)
    into, back = measure(store, torch.device("cpu"), 1 << 20)
    assert into > 1e5 and back > 1e5 and store.used == 0
    store.close()


def test_what_is_no_plan_is_refused():
    with pytest.raises(ValueError, match="swap must be a plan, shares, or 'auto', got 'memo'"):
        sequence_parallel(MODEL, group=alone(), swap="memo")
    with pytest.raises(ValueError, match="got 'memo'"):
        Swapping(MODEL, "memo", None)
    with pytest.raises(ValueError, match="must be at least 0 and sum to 1"):
        step(wrapped(alone(), swap={"layer_input": Fractions(0.5, 0.0, 0.0)}))


@pytest.mark.spmd(4)
@pytest.mark.parametrize("planned", [False, True], ids=["call", "plan"])
def test_under_fsdp2(group, planned):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    expected = step(wrapped(alone()))
    inner, mesh = copy.deepcopy(MODEL), init_device_mesh("cpu", (4,))
    for part in (*inner.blocks, inner):
        fully_shard(part, mesh=mesh)
    model = sequence_parallel(inner, group=group, sync_gradients=False, swap=HALF)
    tokens = tokens_of()
    for _ in range(2):  # plans are made in the first step
        model.zero_grad()
        if planned:
            loss = run_plan(model, any_plan(LENGTHS, 4, 1), tokens, labels=tokens, lengths=LENGTHS)
        else:
            loss = model(tokens, labels=tokens, lengths=LENGTHS).loss
            loss.backward()
    assert planned or model.swap._swaps[0].saved, "nothing was swapped"
    model.swap.close()
    found = [loss.detach(), *(p.grad.full_tensor() for p in model.parameters())]
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).norm() <= 1e-10 * right.norm().clamp(min=1e-9)
