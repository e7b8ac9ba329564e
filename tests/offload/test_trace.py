"""A trace is what a real step would do: its buffers, their lives, and what autograd keeps, without the memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar import Cut
from seqpar.models import HybridConfig, HybridLM
from seqpar.offload.trace import KINDS, allocator_trace, trace
from seqpar.training.device_memory import saved_bytes

CONFIG = HybridConfig(dim=32, layers=3, heads=4, softmax_every=2)


def decoder(tokens, config=CONFIG, dtype=torch.float32):
    """A step of a decoder of the bundled layers; with the dtype set before, as fake tensors cannot be converted."""

    def build():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = HybridLM(config)
        torch.set_default_dtype(before)
        x = torch.zeros(1, tokens, dtype=torch.int64)

        def step():
            logits = model(x, Cut.whole([tokens]))
            functional.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()

        return model, step

    return build


class Chain(nn.Module):
    """``sigmoid(x W)``: what it needs can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.linear(x))


def chain(rows, requires_grad=False):
    def build():
        model, x = Chain(), torch.zeros(rows, 8, requires_grad=requires_grad)
        return model, lambda: model(x).sum().backward()

    return build


def test_a_chain_by_hand():
    """Saved: the input of the product and the output of the sigmoid; the product itself goes at once."""
    found = trace(chain(100))
    weight, saved = found.of_kind("parameter"), found.of_kind("saved")
    assert [buffer.size for buffer in weight] == [8 * 16 * 4]
    assert [buffer.size for buffer in found.of_kind("gradient")] == [8 * 16 * 4]
    assert sorted(buffer.size for buffer in saved) == [100 * 8 * 4, 100 * 16 * 4]
    products = [each for each in found.buffers if each.layer == "linear" and each.kind == "transient"]
    assert [each.buffer.size for each in products] == [100 * 16 * 4]
    sigmoid = next(buffer for buffer in saved if buffer.size == 100 * 16 * 4)
    assert products[0].buffer.birth < sigmoid.birth < products[0].buffer.death < sigmoid.death
    assert {each.layer for each in found.buffers} == {"", "linear"}


def test_lives_and_bytes_fit_together():
    found = trace(decoder(64))
    live = found.live_bytes()
    assert len(live) == found.num_events
    assert all(0 <= each.buffer.birth < each.buffer.death <= found.num_events for each in found.buffers)
    by_kind = [found.live_bytes(kind) for kind in KINDS]
    assert [sum(column) for column in zip(*by_kind)] == live
    assert found.peak_bytes == max(live) == sum(found.at_peak().values())
    assert len({each.buffer.id for each in found.buffers}) == len(found.buffers)
    parameters = sum(buffer.size for buffer in found.of_kind("parameter"))
    assert parameters == sum(p.numel() * 4 for p in HybridLM(CONFIG).parameters())
    assert sum(buffer.size for buffer in found.of_kind("gradient")) == parameters
    ends = [each.buffer.death for each in found.buffers if each.kind in ("parameter", "gradient")]
    assert set(ends) == {found.num_events}, "they are still there when the step is over"


@pytest.mark.parametrize("tokens", [33, 256])
def test_saved_bytes_are_those_of_a_real_step(tokens):
    """Counted on a real CPU by a hook that knows nothing of the trace; the input's tokens are saved in both."""
    model, x = HybridLM(CONFIG), torch.zeros(1, tokens, dtype=torch.int64)

    def forward():
        return functional.cross_entropy(model(x, Cut.whole([tokens])).flatten(0, 1), x.flatten())

    real = saved_bytes(forward, [*model.parameters(), *model.buffers()])
    assert sum(buffer.size for buffer in trace(decoder(tokens)).of_kind("saved")) == real


def test_checkpointed_layers_keep_their_inputs_only():
    plain, again = (
        trace(decoder(256, HybridConfig(dim=32, layers=3, heads=4, softmax_every=1, checkpoint=checkpoint)))
        for checkpoint in (False, True)
    )
    first = [max(each.live_bytes("saved")) for each in (plain, again)]
    assert first[1] < 0.6 * first[0]
    assert again.peak_bytes < plain.peak_bytes


def test_twice_the_tokens_are_twice_the_saved_bytes():
    """Of softmax attention too: no square of the length is ever there."""
    config = HybridConfig(dim=32, layers=2, heads=4, softmax_every=1)
    one, two = (
        sum(buffer.size for buffer in trace(decoder(tokens, config)).of_kind("saved")) for tokens in (512, 1024)
    )
    assert two == pytest.approx(2 * one, rel=0.01)


class Operations(TorchDispatchMode):
    """How many operations run here, whatever time they take."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_million_tokens_of_a_7b_layer_take_the_work_of_a_thousand_and_no_memory():
    config = HybridConfig(dim=4096, layers=1, heads=32, softmax_every=1)
    with Operations() as of_a_few:
        trace(decoder(2**10, config, torch.bfloat16))
    with Operations() as of_many:
        found = trace(decoder(2**20, config, torch.bfloat16))
    assert 0 < of_many.count <= 1.1 * of_a_few.count
    assert 100 * 2**30 < max(found.live_bytes("saved")) < 400 * 2**30


def test_a_trace_leaves_nothing_behind():
    model, x = Chain(), torch.ones(3, 8)
    trace(lambda: (Chain(), lambda: None))
    assert not model.linear._forward_pre_hooks and not model.linear._forward_hooks
    assert model(x).sum().item() != 0.0, "tensors are real again"


def test_a_step_that_looks_at_values_is_refused():
    def build():
        model, x = Chain(), torch.zeros(3, 8)
        return model, lambda: float(model(x).sum())

    with pytest.raises(ValueError, match="the step looks at values, which a trace does not have"):
        trace(build)


def test_the_history_of_an_allocator_is_a_trace():
    """Two buffers at one address, one after the other; one that was there before; one that stays."""
    events = [
        {"action": "free_requested", "addr": 9, "size": 64},
        {"action": "alloc", "addr": 1, "size": 100},
        {"action": "alloc", "addr": 2, "size": 10},
        {"action": "segment_alloc", "addr": 0, "size": 1000},
        {"action": "free_requested", "addr": 1, "size": 100},
        {"action": "free_completed", "addr": 1, "size": 100},
        {"action": "alloc", "addr": 1, "size": 50},
        {"action": "free_requested", "addr": 1, "size": 50},
    ]
    found = allocator_trace(events)
    assert [(each.buffer.size, each.buffer.birth, each.buffer.death) for each in found.buffers] == [
        (100, 0, 2),
        (10, 1, 5),
        (50, 3, 4),
    ]
    assert found.peak_bytes == 110 and found.live_bytes() == [100, 110, 10, 60, 10]
    with pytest.raises(ValueError, match="no event of the allocator: 'size' is missing"):
        allocator_trace([{"action": "alloc", "addr": 1}])
