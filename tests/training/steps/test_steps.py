"""Schedules, logs, errors that all ranks say, and numbers that are none, named by rank and layer."""

import json
import math

import pytest
import torch
from torch import nn

from seqpar import sequence_parallel
from seqpar.training.steps import Log, Progress, cosine, first_nonfinite, memory_bytes, split_ranks, together
from tests.training.test_wrap import LENGTHS, batch, tiny

# Agreement.


@pytest.mark.spmd(1, 3)
def test_an_error_of_one_rank_is_raised_on_all(group):
    assert together(group, lambda: group.rank + 5) == group.rank + 5

    def fail():
        if group.rank >= group.size // 2:
            raise ValueError(f"datä of rank {group.rank}")
        return group.rank

    with pytest.raises(ValueError, match=f"^datä of rank {group.size // 2}$"):
        together(group, fail)
    assert together(group, lambda: "goes on") == "goes on"


@pytest.mark.spmd(3)
def test_a_number_of_ranks_that_does_not_divide_is_refused(group):
    with pytest.raises(ValueError, match="2 ranks to a sequence must divide the number of ranks, 3"):
        split_ranks(group, 2)


# Numbers that are none.


class Spoiled(nn.Module):
    """Spoils the rows of one document on their way forward, or their gradients on the way back."""

    def __init__(self, inner, where):
        super().__init__()
        self.inner, self.where, self.now = inner, where, False

    def forward(self, x):
        y = self.inner(x)
        if not self.now:
            return y
        if self.where == "forward":
            return y * torch.full_like(y, torch.nan)
        return Endless.apply(y)


class Endless(torch.autograd.Function):
    """The same, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def spoil(model, where, guilty):
    if where == "weight":
        with torch.no_grad():
            model.mixers[2].project.bias[1] = torch.nan
        return
    model.mixers[2].out = Spoiled(model.mixers[2].out, where)
    model.mixers[2].out.now = guilty


@pytest.mark.spmd(4)
@pytest.mark.parametrize("where", ["forward", "backward", "weight"])
def test_the_rank_and_layer_of_the_first_number_that_is_none_are_named_on_every_rank(group, where):
    model = tiny()
    spoil(model, where, group.rank == 2)
    model = sequence_parallel(model, group=group)
    tokens, labels = batch(LENGTHS)

    def run():
        model.zero_grad()
        loss = model(tokens, labels=labels, lengths=LENGTHS).loss
        loss.backward()
        return loss

    run()
    assert not torch.cat([each.grad.flatten() for each in model.parameters()]).isfinite().all(), "all ranks see it"
    found = first_nonfinite(model, run, group)
    assert (
        found
        == {
            "forward": "rank 2 of 4, layer module.mixers.2.out: its output is not finite",
            "backward": "rank 2 of 4, layer module.mixers.2.out.inner: the gradient that it gets is not finite",
            "weight": "rank 0 of 4, layer module.mixers.2.project: a weight is not finite",
        }[where]
    )
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.spmd(2)
def test_where_all_is_finite_nothing_is_named(group):
    model = sequence_parallel(tiny(), group=group)
    tokens, labels = batch(LENGTHS)
    found = first_nonfinite(model, lambda: model(tokens, labels=labels, lengths=LENGTHS).loss.backward(), group)
    assert found == "nothing that is not finite was found when the step was computed again"


# The rate.


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_the_rate_rises_evenly_and_falls_along_a_cosine(warm_up):
    steps, rates = 12, []
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = cosine(optimizer, steps, warm_up, least=0.2)
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        along = (step - warm_up) / (steps - warm_up)
        falling = 0.1 + 0.4 * (1 + math.cos(math.pi * along)) / 2
        expected = 0.5 * (step + 1) / (warm_up + 1) if step < warm_up else falling
        assert rate == pytest.approx(expected, rel=1e-12)


def test_a_schedule_goes_on_from_its_state_which_is_plain_numbers():
    def made():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, cosine(optimizer, 9, 3)

    def advance(optimizer, schedule, steps):
        rates = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole, (optimizer, schedule) = advance(*made(), 9), made()
    first = advance(optimizer, schedule, 4)
    again = made()
    again[0].load_state_dict(optimizer.state_dict())
    again[1].load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert first + advance(*again, 5) == whole
    with pytest.raises(ValueError, match="0 <= warm_up < steps"):
        cosine(made()[0], 3, 3)


# The log.


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_every_step_has_one_line_whatever_a_run_left(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for step in range(1, 6):
        log.write({"step": step, "loss": torch.tensor(1.0).item() / step})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    log = Log(path, after=3)
    log.write({"step": 4, "loss": math.nan, "note": "äöü\n"})
    log.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    assert rows(path)[-1] == {"step": 4, "loss": None, "note": "äöü\n"}
    Log(path).close()
    assert path.read_bytes() == b"", "a new run"


def test_logs_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*: No such file or directory"):
        Log(tmp_path / "no" / "log.jsonl")
    with pytest.raises(ValueError, match=r"cannot write .*: Is a directory"):
        Log(tmp_path)
    (tmp_path / "notes.txt").write_text("my notes\n")
    with pytest.raises(ValueError, match="is no log of a run: line b'my notes"):
        Log(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"
    log = Log("/dev/full")
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device"):
        log.write({"step": 1})


def test_what_a_step_did_is_a_row_and_a_line():
    done = Progress(3, 2.5, 0.25, 1e-3, 4096, 1024, 2.0, 2_000_000, 2**30, flops=4e12, peak_flops=8e12, note="odd")
    assert done.row()["tokens_per_second"] == 2048 and done.row()["mfu"] == 0.25
    line = done.line()
    for part in ("step      3", "loss 2.5000", "2,048/s", "1,024 a rank", "2.00 MB", "1.00 GiB", "25.0% of 8 TFLOP/s"):
        assert part in line
    assert line.endswith("odd") and Progress(1, 1, 1, 1, 1, 1, 1.0, 0, 0).mfu is None
    assert memory_bytes(torch.device("cpu")) > 2**20
