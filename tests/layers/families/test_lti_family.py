"""Linear time-invariant layers and the batch norm of a cut sequence: what the battery does not see of them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again

from seqpar import Cut, Shard, sequence_parallel
from seqpar.collectives import Group, Ledger, alone, run_ranks
from seqpar.layers.parts.sequence_norm import SequenceBatchNorm, moments
from seqpar.layers.ssm.lmu import LMU, legendre_memory
from seqpar.layers.ssm.lmuformer import ConvFFN, ConvPatchEmbedding, LMUFormer
from seqpar.layers.ssm.lssl import LSSL
from seqpar.layers.ssm.s4 import S4
from seqpar.layers.ssm.s4d import S4D
from seqpar.layers.ssm.s5 import hippo_normal
from seqpar.layers.ssm.state_space import bilinear, hippo_legs, hold
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, relative

LENGTHS = [7, 0, 1, 12]


# --- S4 and LSSL -----------------------------------------------------------------------------------------------------


def test_s4_starts_as_the_dense_hippo_of_lssl() -> None:
    """Diagonal plus rank 1 in another basis: the same system, up to the fp32 in which weights start."""
    s4, lssl, x = S4(3, state_dim=8).double(), LSSL(3, state_dim=8).double(), drawn(2, 40, 3)
    basis = hippo_normal(8)[1].to(torch.complex128)
    with torch.no_grad():
        lssl.c.copy_(2 * (torch.view_as_complex(s4.c) @ basis.mH).real[:, None])
        lssl.skip.copy_(s4.skip[:, None])
        lssl.log_step.copy_(s4.log_step)
        assert relative(s4.mix((x,), Cut.whole([40])), lssl.mix((x,), Cut.whole([40]))) < 1e-5


def test_s4_without_its_rank_1_is_s4d() -> None:
    s4, s4d, x = S4(3, state_dim=6, sampling="zoh").double(), S4D(3, state_dim=6).double(), drawn(2, 19, 3)
    with torch.no_grad():
        s4.p.zero_()
        s4.b.copy_(torch.tensor([1.0, 0.0]))
        for name in ("log_rate", "frequency", "log_step", "c", "skip"):
            getattr(s4, name).copy_(getattr(s4d, name))
        assert relative(s4.mix((x,), Cut.whole([7, 12])), s4d.mix((x,), Cut.whole([7, 12]))) < 1e-13


@pytest.mark.parametrize("layer", [S4(3, state_dim=6), LSSL(3, state_dim=5), LMU(3, memory_dim=6, theta=9)])
def test_nothing_depends_on_how_long_a_sequence_is(layer: nn.Module) -> None:
    layer, x = copy.deepcopy(layer).double(), drawn(1, 70, 3)
    with torch.no_grad():
        assert relative(layer(x[:, :17], Cut.whole([17])), layer(x, Cut.whole([70]))[:, :17]) < 1e-13


def test_s4_is_stable_whatever_is_learned_if_it_is_tied() -> None:
    radius = {}
    for tied in (True, False):
        layer = S4(20, state_dim=8, tied=tied).double()
        with torch.no_grad():
            for parameter in (layer.log_rate, layer.frequency, layer.p, layer.log_step, *([] if tied else [layer.q])):
                parameter.copy_(2 * drawn(*parameter.shape, seed=parameter.numel()))
            if layer.q is not None:
                layer.q.neg_()
            radius[tied] = torch.linalg.eigvals(layer.system()[0]).abs().amax().item()
    assert radius[True] < 1 < radius[False]


def test_s4_and_lssl_learn_through_their_matrices() -> None:
    """Gradients of all weights against differences, through sampling and powers."""
    for layer in (S4(2, state_dim=4), S4(2, state_dim=4, sampling="zoh", tied=False), LSSL(2, state_dim=3)):
        layer, x, d_y = layer.double(), drawn(1, 9, 2), drawn(1, 9, 2, seed=1)
        for name, parameter in layer.named_parameters():
            way, step = drawn(*parameter.shape, seed=3), 1e-5
            (grad,) = torch.autograd.grad(layer(x, Cut.whole([9])), parameter, d_y)
            with torch.no_grad():
                parameter += step * way
                ahead = (layer(x, Cut.whole([9])) * d_y).sum()
                parameter -= 2 * step * way
                slope = (ahead - (layer(x, Cut.whole([9])) * d_y).sum()) / (2 * step)
                parameter += step * way
            assert ((grad * way).sum() - slope).abs() < 1e-6 * (1 + slope.abs()), name


def test_rules_of_sampling_agree_for_small_steps_and_the_hold_is_exact() -> None:
    a, b = (x[None] for x in hippo_legs(6))
    for rule, order in ((bilinear, 3), (hold, 16)):
        errors = []
        for step in (0.02, 0.01):
            once, drive = rule(a, b, torch.tensor([2 * step], dtype=torch.float64))
            half, half_drive = rule(a, b, torch.tensor([step], dtype=torch.float64))
            twice = torch.cat([half @ half, (half @ half_drive[..., None]) + half_drive[..., None]], -1)
            errors.append(relative(torch.cat([once, drive[..., None]], -1), twice))
        if rule is hold:
            assert max(errors) < 1e-14
        else:
            assert 6 < errors[0] / errors[1] < 2**order + 1


# --- LMU -------------------------------------------------------------------------------------------------------------


def test_the_memory_of_an_lmu_is_of_its_last_theta_tokens() -> None:
    """All Legendre polynomials are 1 at the far end, so the sum of the coefficients is what came in ``theta`` ago. An
    input is held over the step that ends with it: it is half a token old."""
    theta, t = 60, torch.arange(400.0, dtype=torch.float64)
    layer = LMU(1, memory_dim=12, theta=theta).double()

    def signal(t: Tensor) -> Tensor:
        return 2 + torch.sin(t / 11) + torch.cos(t / 25)

    with torch.no_grad():
        layer.encode.weight.fill_(1)
        layer.encode.bias.zero_()
        layer.out.weight.fill_(1)
        found = layer.mix(layer.project(signal(t)[None, :, None], t), Cut.whole([400]))[0, :, 0]
    assert relative(found[200:], signal(t[200:] - theta + 0.5)) < 1e-3
    assert relative(found[200:], signal(t[200:] - theta / 2)) > 0.1


def test_powers_of_the_memory_keep_their_digits() -> None:
    """In fp32 a power of the paper's memory has none left where its norm has decayed; what is read must be right."""
    layer, x = LMU(4, memory_dim=128, theta=128), drawn(1, 600, 4)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        ours = layer.mix(layer.project(x.float(), torch.arange(600)), Cut.whole([600]))
        theirs = exact.mix(exact.project(x, torch.arange(600)), Cut.whole([600]))
    assert relative(ours.double(), theirs) < 2e-6
    a = legendre_memory(128, 128.0, torch.device("cpu"))[0]
    known, fp32 = torch.linalg.matrix_power(a, 512), torch.linalg.matrix_power(a.float(), 512).double()
    assert relative(fp32, known) > 1e-3  # so it is fp64 that does it


# --- batch norm ------------------------------------------------------------------------------------------------------


def batch_norms() -> tuple[SequenceBatchNorm, nn.BatchNorm1d]:
    ours, theirs = SequenceBatchNorm(5, momentum=0.3).double(), nn.BatchNorm1d(5, momentum=0.3).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(ours, name).copy_(drawn(5, seed=len(name)))
            getattr(theirs, name).copy_(getattr(ours, name))
    return ours, theirs


@pytest.mark.parametrize("size", (1, 3, 5, 30))
def test_a_batch_norm_of_a_cut_sequence_is_torchs_of_the_whole(size: int) -> None:
    ours, theirs = batch_norms()
    x, d_y = 3 + drawn(2, 20, 5), drawn(2, 20, 5, seed=1)
    whole = x.clone().requires_grad_()
    expected = theirs(whole.flatten(0, 1)).view_as(x)
    expected.backward(d_y)

    def body(group: Group) -> list[Tensor]:
        layer, shard = copy.deepcopy(ours), Shard.of(LENGTHS, group, "zigzag")
        mine = shard.take(x).clone().requires_grad_()
        y = layer(mine, Cut(shard, group))
        y.backward(shard.take(d_y))
        grads = [group.all_reduce(p.grad).wait() for p in (layer.weight, layer.bias)]
        return [shard.gather(y.detach()), shard.gather(mine.grad), *grads, layer.running_mean, layer.running_var]

    wanted = [expected.detach(), whole.grad, theirs.weight.grad, theirs.bias.grad]
    outcomes = run_ranks(size, body)
    for outcome in outcomes:
        for found, right in zip(outcome, [*wanted, theirs.running_mean, theirs.running_var]):
            assert relative(found, right) < 1e-12
        assert torch.equal(outcome[4], outcomes[0][4]) and torch.equal(outcome[5], outcomes[0][5])


def test_running_statistics_are_used_in_eval_and_nothing_is_sent() -> None:
    ours, theirs = batch_norms()
    x = drawn(2, 20, 5)
    ours(x, Cut.whole(LENGTHS)), theirs(x.flatten(0, 1))
    ours.eval(), theirs.eval()

    def body(group: Group) -> tuple[Tensor, int]:
        ledger = Ledger(group)
        shard = Shard.of(LENGTHS, ledger)
        y = ours(shard.take(x), Cut(shard, ledger, states=States()))
        sent = ledger.bytes_
        return shard.gather(y.detach()), sent

    for y, sent in run_ranks(3, body):
        assert relative(y, theirs(x.flatten(0, 1)).view_as(x).detach()) < 1e-13
        assert sent == 0


def test_running_statistics_move_once_when_it_is_computed_again() -> None:
    (once, _), x = batch_norms(), drawn(2, 20, 5).requires_grad_()
    again = copy.deepcopy(once)
    once(x, Cut.whole(LENGTHS)).sum().backward()
    run_again(again, x, Cut.whole(LENGTHS), use_reentrant=False).sum().backward()
    assert torch.equal(once.running_mean, again.running_mean) and torch.equal(once.running_var, again.running_var)


def test_variances_keep_their_digits_beside_a_large_mean() -> None:
    x = 4096 + drawn(1, 500, 3)

    def body(group: Group) -> Tensor:
        shard = Shard.of([500], group)
        return moments(shard.take(x).float(), shard=shard, group=group)[1]

    right = x.float().double().var((0, 1), unbiased=False)
    for var in run_ranks(4, body):
        assert relative(var.double(), right) < 1e-5


def test_a_batch_norm_that_trains_keeps_no_states() -> None:
    with pytest.raises(ValueError, match="keeps no states"):
        batch_norms()[0](drawn(1, 4, 5), Cut.whole([4], States()))


# --- LMUFormer -------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.blocks = nn.ModuleList([LMUFormer(6, theta=9), ConvFFN(6, 8), LMUFormer(6, theta=9, embeds=False)])

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cut)
        return self.head(x)


def test_a_wrapped_model_moves_running_statistics_and_gets_whole_gradients() -> None:
    torch.manual_seed(0)
    model, tokens = Classifier().double(), torch.arange(40).view(2, 20) * 5 % 7

    def body(group: Group) -> list[Tensor]:
        mine = copy.deepcopy(model)
        sequence_parallel(mine, group=group)(tokens, labels=tokens, lengths=LENGTHS).loss.backward()
        return [*(p.grad for p in mine.parameters()), *(b for b in mine.buffers())]

    (right,) = run_ranks(1, body)
    assert all(
        not torch.equal(moved, start) for moved, start in zip(right[-len(list(model.buffers())) :], model.buffers())
    )
    scale = max(x.norm() for x in right)
    for found in run_ranks(3, body):
        assert max((x - y).norm() / scale for x, y in zip(found, right)) < 1e-12


def test_the_feed_forward_part_is_that_of_its_paper_on_ranks() -> None:
    layer, x, norm = ConvFFN(3, 5).double(), drawn(2, 20, 3), nn.functional.batch_norm
    with torch.no_grad():
        inner = norm(layer.up(x).flatten(0, 1), None, None, training=True)
        expected = norm(layer.down(nn.functional.gelu(inner)), None, None, training=True).relu().view_as(x)

    def body(group: Group) -> Tensor:
        shard = Shard.of(LENGTHS, group)
        return shard.gather(copy.deepcopy(layer)(shard.take(x), Cut(shard, group)).detach())

    assert max(relative(y, expected) for y in run_ranks(3, body)) < 1e-12


def test_an_embedding_may_change_the_width() -> None:
    torch.manual_seed(0)
    layer, x = ConvPatchEmbedding(4, in_dim=3, layers=2).double(), drawn(1, 20, 3)
    with torch.no_grad():
        expected = layer(x, Cut.whole([20]))
        assert expected.shape == (1, 20, 4)
        channels = x.mT
        for weight, norm in zip(layer.convs, layer.norms):
            channels = nn.functional.conv1d(channels, weight, padding=1).relu()
            channels = nn.functional.batch_norm(channels, None, None, norm.weight, norm.bias, training=True)
        channels = channels + nn.functional.conv1d(channels, layer.convs[2], padding=1)
    assert relative(expected, channels.mT) < 1e-13


# --- all of them -----------------------------------------------------------------------------------------------------


def test_a_decoder_of_all_of_them_steps_as_it_reads() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(pattern="s4 lssl lmu", vocabulary=7, dim=4, heads=2)).double()
    tokens = torch.arange(9)[None] * 5 % 7
    expected, states, logits = model(tokens, Cut.whole([9])), States(), []
    for token in tokens.unbind(1):
        each, states = model.step(token, states)
        logits.append(each)
    assert relative(torch.stack(logits, 1), expected) < 1e-12


def test_backward_sends_one_state_more() -> None:
    def body(group: Group) -> int:
        ledger = Ledger(group)
        shard = Shard.of([10], ledger)
        x = torch.zeros(1, shard.num_local, 3, requires_grad=True)
        S4(3, state_dim=4)(x, Cut(shard, ledger, scan="ring")).sum().backward()
        return ledger.bytes_

    assert sum(run_ranks(2, body)) == 2 * 4 * 3 * 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: S4(8, state_dim=5), "must be even, got 5"),
        (lambda: S4(8, sampling="euler"), "sampling must be one of bilinear, zoh, got 'euler'"),
        (lambda: S4(0), "dim must be at least 1, got 0"),
        (lambda: LSSL(8, channels=0), "channels must be at least 1, got 0"),
        (lambda: LSSL(8, state_dim=0), "state_dim must be at least 1"),
        (lambda: LMU(8, memory_dim=0), "memory_dim must be at least 1"),
        (lambda: LMU(8, theta=0), "theta must be above 0 tokens, got 0"),
        (lambda: ConvPatchEmbedding(8, layers=0), "layers must be at least 1"),
        (lambda: ConvFFN(8, hidden=0), "hidden must be at least 1"),
        (lambda: SequenceBatchNorm(0), "dim must be at least 1"),
        (lambda: SequenceBatchNorm(4, momentum=2), "momentum must be from 0 to 1, got 2"),
    ],
)
def test_what_cannot_be_built_is_refused(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_tokens_that_are_not_mine_are_refused() -> None:
    shard = Shard.of([6], alone())
    for layer in (S4(4), LSSL(4), LMU(4), LMUFormer(4), LMUFormer(4, embeds=False), SequenceBatchNorm(4)):
        with pytest.raises(ValueError, match="6 tokens"):
            layer(torch.zeros(1, 5, 4), Cut(shard, alone()))
