"""Calibration: what is timed is what a plan's micro-batch does, every rank finds the same, and the fit predicts."""

import argparse
import copy
import io
import threading
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from seqpar import Cut, Shard, sequence_parallel
from seqpar.collectives import run_ranks
from seqpar.commands.calibrate import add_arguments
from seqpar.commands.calibrate_report import report
from seqpar.estimates.calibrate import Calibration, _kinds, calibrate
from seqpar.models import HybridConfig, HybridLM
from seqpar.planner import Cluster, CostModel, GroupKind, Options, check, plan_batch, problem_of
from seqpar.planner.problem.files import costs_from_json, read_costs
from seqpar.planner.problem.fit import FitError, Sample, seconds_of
from seqpar.sharding.agreement import text_fingerprint
from seqpar.training.device_memory import saved_bytes, state_bytes, usable_bytes
from seqpar.training.loss import next_token_loss


def small_model(heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    config = HybridConfig(vocabulary=16, dim=4 * heads, layers=2, heads=heads, softmax_every=2)
    return HybridLM(config).to(dtype)


def kinds_of(calibration):
    return [(kind.degree, kind.transport) for kind in calibration.costs.kinds]


class Toy(nn.Module):
    """A model whose forward ``does`` something with its cut; its groups talk in the loss only."""

    def __init__(self, does=lambda tokens, cut: None):
        super().__init__()
        self.embedding = nn.Embedding(50, 50)
        self.does = does

    def __deepcopy__(self, memo):
        twin = Toy(self.does)
        twin.embedding = copy.deepcopy(self.embedding, memo)
        return twin

    def forward(self, tokens, cut):
        self.does(tokens, cut)
        return self.embedding(tokens)


# Every rank finds the same.


@pytest.mark.sampled(3)
@pytest.mark.spmd(1, 2, 3, 4, 6)
def test_all_ranks_return_the_same_for_every_degree_that_divides_them(group):
    model = small_model(heads=2)
    found = calibrate(model, group, lengths=[16, 32], repeats=1)
    expected = {
        1: [(1, "none")],
        2: [(1, "none"), (2, "all_to_all"), (2, "ring")],
        3: [(1, "none"), (3, "ring")],
        4: [(1, "none"), (2, "all_to_all"), (2, "ring"), (4, "ring")],
        6: [(1, "none"), (2, "all_to_all"), (2, "ring"), (3, "ring"), (6, "ring")],
    }
    assert kinds_of(found) == expected[group.size]
    everyones = group.all_gather(torch.tensor([text_fingerprint(repr(found))])).wait()
    assert len({int(number) for number in everyones}) == 1
    assert len(found.samples) == 4 * len(kinds_of(found))
    assert costs_from_json(found.to_json()) == (found.costs, found.cluster)
    assert (found.cluster.devices, found.cluster.devices_per_node) == (group.size, group.size)


@pytest.mark.spmd(2)
def test_the_model_stays_as_it_is(group):
    model = small_model()
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, group, lengths=[16, 32], repeats=1, degrees=[2], transports=["all_gather"])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert list(gradients) == ["embedding.weight"] and (gradients["embedding.weight"] == 1).all()


@pytest.mark.spmd(2, 4)
def test_ranks_that_ask_for_different_things_are_refused_on_every_rank(group):
    lengths = [16, 32 + (group.rank == group.size - 1)]
    with pytest.raises(ValueError, match="what to calibrate must be the same on every rank"):
        calibrate(small_model(), group, lengths=lengths)
    with pytest.raises(ValueError, match="what to calibrate must be the same on every rank"):
        calibrate(small_model(heads=2 + 2 * group.rank), group, lengths=[16, 32])


# What is timed.


class Flops(TorchDispatchMode):
    """A clock that only work moves: a nanosecond for each operation of a matrix product of this thread, and a fixed
    time for each call of anything."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
        self.seconds += 1e-8 + 1e-9 * count(*args, **(kwargs or {}), out_val=out)
        return out


def step_seconds(model, group, everyone, lengths, transport, clock):
    """Written again: one forward and backward of every group at once, the slowest rank's."""
    tokens = torch.randint(16, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    start = clock.seconds
    cut = Cut(Shard.of(lengths, group), group, transport)
    logits = model(cut.shard.take(tokens), cut)
    next_token_loss(logits, tokens, shard=cut.shard, group=group).backward()
    mine = torch.tensor([clock.seconds - start], dtype=torch.float64)
    model.zero_grad()
    return max(float(seconds) for seconds in everyone.all_gather(mine).wait())


@pytest.mark.sampled(3)
@pytest.mark.spmd(1, 2, 4)
def test_the_fit_predicts_documents_that_were_not_timed(group):
    """Real layers, forward and backward, on a clock that counts what they compute."""
    with Flops() as clock:
        assert worst_ratio(small_model(), group, clock) < 1.3


def worst_ratio(model, group, clock):
    """Between what is predicted and what is timed, the same on every rank."""
    found = calibrate(model, group, lengths=[64, 256, 768], repeats=3, clock=lambda: clock.seconds)
    ratios = []
    for kind in found.costs.kinds:
        part = group.partition([list(range(first, first + kind.degree)) for first in range(0, group.size, kind.degree)])
        for lengths in ([500], [100, 30, 300]):
            transport = "ring" if kind.transport == "none" else kind.transport
            ratios.append(step_seconds(model, part, group, lengths, transport, clock) / seconds_of(kind, lengths))
    return max(max(ratio, 1 / ratio) for ratio in ratios)


class Clock:
    """Time that passes in forward only, as a function of its cut."""

    def __init__(self, takes):
        self.takes, self.now = takes, 0.0

    def __call__(self):
        return self.now

    def passes(self, tokens, cut):
        self.now += self.takes(tokens.shape[1], cut)


def calibrated(size, lengths, takes, **options):
    """What the last rank finds if a step takes every rank what ``takes(my tokens, cut)`` says."""

    def body(group):
        clock = Clock(lambda mine, cut: takes(group.rank, mine, cut))
        return calibrate(Toy(clock.passes), group, lengths=lengths, clock=clock, **options)

    return run_ranks(size, body)[-1]


def test_a_step_takes_as_long_as_its_slowest_rank():
    def takes(rank, mine, cut):
        return (2 if rank == 1 else 1) * 2e-4 * mine + 1e-4 * cut.shard.num_tokens + 4e-3

    one, two = calibrated(3, [60, 240], takes, transports=["ring"]).costs.kinds
    assert one.linear_seconds == pytest.approx(5e-4)
    assert one.fixed_seconds == pytest.approx(4e-3)
    assert (one.message_seconds, one.latency_seconds) == (0, 0)
    # A third of the tokens at 4e-4, and all of them at 1e-4: of that, a third of one device's 5e-4 is computation.
    assert two.linear_seconds == pytest.approx(5e-4 / 3)
    assert two.message_seconds == pytest.approx(4e-4 / 3 + 1e-4 - 5e-4 / 3)
    assert two.fixed_seconds + two.latency_seconds == pytest.approx(4e-3)


def test_time_of_squared_tokens_is_told_from_that_of_tokens_and_of_steps():
    def takes(rank, mine, cut):
        return (
            1e-6 * sum(length**2 for length in cut.shard.lengths) + 3e-5 * cut.shard.num_tokens
        ) / cut.group.size + 0.02

    found = calibrated(4, [64, 128], takes)
    for kind in found.costs.kinds:
        assert kind.quadratic_seconds * kind.degree == pytest.approx(1e-6)
        assert kind.linear_seconds * kind.degree == pytest.approx(3e-5)
        assert kind.fixed_seconds == pytest.approx(0.02)
    assert found.largest_error < 1e-9


def test_the_planner_plans_with_what_was_found():
    def takes(rank, mine, cut):
        lengths, size = cut.shard.lengths, cut.group.size
        return sum(1e-5 * length**2 + 2e-5 * length for length in lengths) / size + 1e-3 * size

    found = calibrated(4, [64, 128], takes, transports=["ring"])
    plan = plan_batch(problem_of([900, 20, 9, 15, 30], found.cluster, found.costs), Options(seconds=0.2))
    check(problem_of([900, 20, 9, 15, 30], found.cluster, found.costs), plan)
    expected = 1e-5 * 900**2 / 4 + 2e-5 * 900 / 4 + 4e-3  # the long one on all ranks, and then the short ones
    assert expected < plan.step_seconds < expected + 0.03


def test_a_sample_is_the_median_after_a_step_that_warms_up():
    calls = iter(range(1000))

    def takes(rank, mine, cut):
        turn = next(calls) // 4  # four cases
        return (1e-3 * cut.shard.num_tokens) * (100.0, 1.0, 7.0, 1.5, 1.1, 0.1)[min(turn, 5)]

    found = calibrated(1, [64, 128], takes, repeats=4)
    assert [sample.seconds for sample in found.samples] == pytest.approx(
        [0.064 * 1.3, 0.064 * 1.3, 0.128 * 1.3, 0.128 * 1.3]
    )


def recorded(size, lengths, **options):
    """What every call of forward saw: tokens, cut and its number of the calls of that rank."""
    seen, lock = [], threading.Lock()

    def body(group):
        def record(tokens, cut):
            with lock:
                seen.append((group.rank, tokens.clone(), cut))

        return calibrate(Toy(record), group, lengths=lengths, **options)

    return run_ranks(size, body)[0], seen


def test_all_groups_of_a_degree_work_at_the_same_time():
    meeting = threading.Barrier(4)

    def meet(tokens, cut):
        meeting.wait(timeout=1200)  # breaks, and fails the test, unless all four ranks are at work

    found = run_ranks(4, lambda group: calibrate(Toy(meet), group, lengths=[16, 32], repeats=1))[0]
    assert [kind.degree for kind in found.costs.kinds] == [1, 2, 2, 4, 4]


def test_groups_have_their_own_documents_and_ranks_of_one_group_the_same():
    _, seen = recorded(4, [64, 128], degrees=[1, 2], transports=["ring"], repeats=1)
    for degree, whole in ((1, 64), (2, 128)):
        calls = [[(t, c) for r, t, c in seen if r == rank and c.group.size == degree] for rank in range(4)]
        first = [next(t for t, c in each if c.shard.num_tokens == whole) for each in calls]
        parts = [torch.cat(first[at : at + degree], 1) for at in range(0, 4, degree)]
        assert all(part.shape[1] == whole for part in parts)
        assert all(not parts[0].equal(part) for part in parts[1:])
        assert {tuple(c.shard.lengths) for t, c in calls[0]} == {tuple(c.shard.lengths) for t, c in calls[3]}


def test_samples_are_single_and_packed_documents_that_change_places():
    found, seen = recorded(1, [64, 100], repeats=2)
    mixes = [sample.lengths for sample in found.samples]
    assert [sum(mix) for mix in mixes] == [64, 64, 100, 100]
    assert [len(mix) for mix in mixes] == [1, 7, 1, 7] and min(map(min, mixes)) >= 1
    packed = [cut.shard.lengths for _, _, cut in seen if cut.shard.num_tokens == 100 and len(cut.shard.lengths) > 1]
    assert len(packed) == len(set(packed)) == 3 and len({tuple(sorted(mix)) for mix in packed}) == 1
    assert max(int(tokens.max()) for _, tokens, _ in seen) in range(40, 50)


def test_a_wrapped_model_is_timed_as_it_is_cut():
    cuts = []

    def body(group):
        toy = Toy(lambda tokens, cut: cuts.append(cut))
        wrapped = sequence_parallel(toy, group=group, layout="zigzag", scan="doubling", transport="all_gather")
        return calibrate(wrapped, group, lengths=[16, 32], repeats=1, transports=["all_to_all"])

    found = run_ranks(2, body)[0]
    assert {(cut.shard.layout, cut.scan) for cut in cuts} == {("zigzag", "doubling")}
    assert {(cut.group.size, cut.transport) for cut in cuts} == {(1, "all_gather"), (2, "all_to_all")}
    assert kinds_of(found) == [(1, "none"), (2, "all_to_all")]


def test_progress_is_told_of_every_step():
    told = []
    run_ranks(1, lambda g: calibrate(Toy(), g, lengths=[16, 32], repeats=2, progress=lambda *at: told.append(at)))
    assert told == [(number, 12) for number in range(1, 13)]


# Memory.


def test_what_autograd_keeps_is_counted_once_and_without_the_weights():
    w = nn.Parameter(torch.randn(100, 100))
    x = torch.randn(10, 100, requires_grad=True)

    def forward():
        y = x @ w  # keeps x and w
        z = y.view(5, 200).exp()  # keeps z
        return (z[:2] * z[3:]).sum() + (x * w[:10]).sum()  # keeps parts of z, and x and w again

    assert saved_bytes(forward, [w]) == 2 * 4000
    assert saved_bytes(forward, []) == 2 * 4000 + 40_000


def test_bytes_of_a_token_follow_the_dtype_and_not_the_degree():
    def bytes_(size, dtype):
        model = small_model(dtype=dtype)
        body = run_ranks(size, lambda g: calibrate(model, g, lengths=[32, 96], repeats=1, degrees=[size]))
        return body[0].costs.bytes_per_token

    single, double = bytes_(1, torch.float32), bytes_(1, torch.float64)
    assert 1.6 * single < double < 2.05 * single  # masks and tokens stay
    assert single < bytes_(2, torch.float32) < 1.5 * single  # a little travels


def test_state_is_weights_gradients_and_two_moments():
    layer = nn.Linear(10, 5)
    assert state_bytes(layer) == 16 * 55
    assert state_bytes(nn.Linear(10, 5).bfloat16()) == 8 * 55
    layer.bias.requires_grad_(False)
    assert state_bytes(layer) == 16 * 50 + 4 * 5
    assert state_bytes(nn.BatchNorm1d(3, affine=False)) == 2 * 3 * 4 + 8


def test_memory_is_shared_by_ranks_unless_given():
    cpu = torch.device("cpu")
    assert 2**26 < usable_bytes(cpu, 4) == pytest.approx(usable_bytes(cpu, 1) / 4, abs=1)
    found = run_ranks(2, lambda g: calibrate(Toy(), g, lengths=[16, 32], repeats=1, memory_bytes=12_345))[0]
    assert found.cluster.memory_bytes == 12_345
    found = run_ranks(2, lambda g: calibrate(Toy(), g, lengths=[16, 32], repeats=1))[0]
    assert found.cluster.memory_bytes == usable_bytes(cpu, 2)


# What cannot be used.


class Mute:
    """A rank that must not send anything."""

    rank, size = 1, 6

    def send(self, *_, **__):
        raise AssertionError("a verb was called before the arguments were checked")

    exchange = all_gather = all_to_all = reduce_scatter = all_reduce = agree = subgroup = partition = close = send


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lengths": []}, "two different lengths"),
        ({"lengths": [64, 64]}, "two different lengths"),
        ({"lengths": [64, 8]}, "at least 16 tokens"),
        ({"lengths": [64, 128.0]}, "whole numbers"),
        ({"lengths": [64, -128]}, "whole numbers"),
        ({"degrees": [4]}, r"degrees must divide the 6 ranks, in nodes of 6: \[1, 2, 3, 6\], got 4"),
        ({"degrees": [2], "devices_per_node": 3}, r"in nodes of 3: \[1, 3, 6\], got 2"),
        ({"devices_per_node": 4}, "6 ranks are not whole nodes of 4"),
        ({"devices_per_node": 0}, "devices_per_node must be at least 1"),
        ({"degrees": [0]}, "got 0"),
        ({"degrees": []}, "at least one degree"),
        ({"transports": []}, "at least one degree and one transport"),
        ({"transports": ["none"]}, "transports must be of ring"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"memory_bytes": 0}, "memory_bytes must be at least 1"),
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
        ({"model": nn.Identity()}, "no parameter"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_message(arguments, says):
    given = {"model": Toy(), "lengths": [16, 32]} | arguments
    with pytest.raises(ValueError, match=f"rank 1 of 6: .*{says}"):
        calibrate(given.pop("model"), Mute(), **given)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"copy.deepcopy of the model failed: cannot pickle"):
        calibrate(model, Mute(), lengths=[16, 32])


@pytest.mark.parametrize(("heads", "both"), [(4, {2, 4}), (6, {2, 3, 6}), (1, set()), (12, {2, 3, 4, 6, 12})])
def test_all_to_all_is_tried_where_it_divides_the_heads(heads, both):
    class Rank(Mute):
        size = 12

    kinds = _kinds(small_model(heads=heads), Rank(), Rank.size, None, None)
    assert {degree for degree, transport in kinds if transport == "all_to_all"} == both
    assert [degree for degree, transport in kinds if transport != "all_to_all"] == [1, 2, 3, 4, 6, 12]


# What is shown.


def calibration(largest=0.05):
    kinds = (GroupKind(1, "none", 2e-9, 3e-6, 0.0105), GroupKind(3, "all_to_all", 0, 1e-6, 0.0105, 5e-7, 0, 0.002))
    errors = (FitError(1, "none", 8, 0.01, 0.02), FitError(3, "all_to_all", 8, 0.03, largest))
    costs = CostModel("Toy", kinds, 2048.0, 3 * 2**20)
    samples = (Sample(1, "none", (5,), 1.0),)
    return Calibration(costs, Cluster("3xcpu", 3, 3, 2**30), errors, samples)


def page(found):
    console = Console(file=io.StringIO(), width=120)
    console.print(report(found))
    return console.file.getvalue()


def test_the_table_shows_costs_and_errors():
    text = page(calibration())
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "none", "2", "3", "-", "10.5", "-", "8", "1.0%", "2.0%"] in rows
    assert ["3", "all-to-all", "-", "1", "0.5", "10.5", "2", "8", "3.0%", "5.0%"] in rows
    assert "Toy on 3xcpu: 2 KiB a token, 3 MiB of state, room for 522,752 tokens in 1 GiB a device" in text
    assert "Warning" not in text


def test_a_fit_that_is_far_off_is_warned_of():
    assert "Warning: degree 3 over all-to-all is up to 27% off" in page(calibration(0.27))
    assert replace(calibration(0.27)).largest_error == 0.27


# The command.


def command(arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


QUICK = ["--tokens", "16,32", "--repeats", "1", "--ranks", "2"]


def test_the_command_shows_a_table_and_writes_what_the_planner_reads(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert command([*QUICK, "--out", str(tmp_path / "costs.json"), "--memory", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "HybridLM on 2xcpu" in out and "all-to-all" in out and "costs.json" in out
    costs, cluster = read_costs(str(tmp_path / "costs.json"))
    assert (cluster.devices, cluster.memory_bytes, len(costs.kinds)) == (2, 2**29, 3)
    assert torch.get_num_threads() == threads


def test_the_command_prints_json_of_your_own_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "calibrated.py").write_text(
        "from seqpar.models import HybridConfig, HybridLM\n"
        "def build():\n    return HybridLM(HybridConfig(vocabulary=16, dim=8, layers=1, heads=1, softmax_every=1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command([*QUICK, "--model", "calibrated:build", "--json"]) == 0
    costs, _ = costs_from_json(capsys.readouterr().out)
    assert [(kind.degree, kind.transport) for kind in costs.kinds] == [(1, "none"), (2, "ring")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "32"], "two different lengths"),
        (["--model", "nothing"], "MODULE:FACTORY"),
        (["--out", "no/such/folder/costs.json"], "cannot write no/such/folder/costs.json: No such file"),
        (["--out", "."], "cannot write .: Is a directory"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, says):
    with pytest.raises(ValueError, match=says):
        command(arguments)


@pytest.mark.parametrize("arguments", [["--tokens", "1,x"], ["--memory", "nan"], ["--memory", "0"], ["--repeats", "0"]])
def test_the_command_refuses_words_that_are_no_numbers(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert "expected" in capsys.readouterr().err
