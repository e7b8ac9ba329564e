"""Who owns a gradient: on any number of ranks parameters get what one device gives them, or ValueError is raised."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seqpar import Cut, next_token_loss, sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.training import gradients as sums
from seqpar.training.gradients import sum_over_ranks
from seqpar.training.wrap import Output
from tests.training.test_wrap import LENGTHS, Mixer, TinyLM, batch, gradients, tiny

quiet = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def loss_of(model, seed=0, lengths=LENGTHS):
    tokens, labels = batch(lengths, seed)
    return model(tokens, labels=labels, lengths=lengths).loss


def uncut_loss(inner, seed=0):
    tokens, labels = batch(LENGTHS, seed)
    cut = Cut.whole(LENGTHS)
    return next_token_loss(inner(tokens, cut), labels, shard=cut.shard, group=alone())


def those(module):
    """All gradients in one vector, zeros where there is none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([each.flatten() for each in found])


def same_on_any_ranks(body, *args, sizes=(2, 3)):
    """``body(group, *args)`` gives on every rank the vector that it gives on one device."""
    expected = body(alone(), *args)
    assert expected.norm() > 0
    for size in sizes:
        for got in run_ranks(size, body, *args):
            assert (got - expected).norm() <= 1e-10 * expected.norm()


def drawn(module, seed=0):
    """Weights from a seed: thread ranks share the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


# what else reaches parameters


def test_unfreezing():
    def body(group):
        inner = tiny()
        model = sequence_parallel(inner, group=group)
        inner.requires_grad_(False)
        inner.head.requires_grad_(True)
        loss_of(model).backward()
        inner.requires_grad_(True)
        inner.head.bias.requires_grad_(False)
        loss_of(model, 1).backward()
        return those(inner)

    same_on_any_ranks(body)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("reentrant", [None, True])
@quiet
def test_terms_beside_the_wrapped_call(together, reentrant):
    """A regulariser and an uncut batch, in the same backward or after it."""

    def body(group):
        inner = tiny(reentrant=reentrant)
        model = sequence_parallel(inner, group=group)
        terms = [uncut_loss(inner, 1), loss_of(model), inner.head.weight.square().sum(), uncut_loss(inner, 2)]
        if together:
            sum(terms).backward()
        else:
            for term in terms:
                term.backward()
        return those(inner)

    same_on_any_ranks(body)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("reentrant", [None, True])
@quiet
def test_several_wrappers_of_one_module(forget, reentrant):
    """Other layouts and groups; each sums its own, in one backward and in several."""

    def body(group):
        inner = tiny(reentrant=reentrant)
        first = sequence_parallel(inner, group=group)
        loss_of(first).backward()
        if forget:
            del first
            gc.collect()
        second = sequence_parallel(inner, group=group, layout="zigzag")
        mine = sequence_parallel(inner, group=alone())
        loss_of(second, 1).backward()
        (loss_of(mine, 2) + loss_of(second, 3) * loss_of(mine, 4)).backward()
        return those(inner)

    same_on_any_ranks(body)


@quiet
def test_wrappers_over_subgroups_with_recomputation():
    """One module over all ranks and over pairs of them, in one backward pass: each sums over its own ranks."""

    def body(group):
        inner = tiny(reentrant=True)
        pair = group.partition([[0, 1], [2, 3]]) if group.size == 4 else group
        a, b = sequence_parallel(inner, group=group), sequence_parallel(inner, group=pair, layout="striped")
        (loss_of(a) + loss_of(b, 1) + loss_of(a, 2)).backward()
        return those(inner)

    same_on_any_ranks(body, sizes=(4,))


def test_actor_and_critic_share_a_trunk():
    class Headed(nn.Module):
        def __init__(self, trunk, seed):
            super().__init__()
            self.trunk, self.scale = trunk, nn.Parameter(torch.full((11,), 1.0 + seed, dtype=torch.float64))

        def forward(self, tokens, cut):
            return self.trunk(tokens, cut) * self.scale

    def body(group):
        trunk = tiny()
        actor, critic = Headed(trunk, 0), Headed(trunk, 1)
        a, c = (sequence_parallel(each, group=group) for each in (actor, critic))
        loss_of(a).backward()
        (loss_of(c, 1) * loss_of(a, 2)).backward()
        return torch.cat([those(trunk), actor.scale.grad, critic.scale.grad])

    same_on_any_ranks(body)


def test_weights_shared_between_wrappers():
    def body(group):
        one, two = tiny(), tiny()
        two.embed.weight = one.embed.weight
        a, b = sequence_parallel(one, group=group), sequence_parallel(two, group=group)
        (loss_of(a) + 2 * loss_of(b, 1)).backward()
        return torch.cat([those(one), those(two)])

    same_on_any_ranks(body)


@pytest.mark.parametrize("reentrant", [None, False, True])
@quiet
def test_accumulation_several_forwards_and_retained_graphs(reentrant):
    def body(group):
        inner = tiny(reentrant=reentrant)
        model = sequence_parallel(inner, group=group)
        loss_of(model).backward()
        first, second = loss_of(model, 1), loss_of(model, 2, [20, 6])
        (first + second).backward(retain_graph=True)
        first.backward(retain_graph=True)
        (second * first).backward()
        return those(inner)

    same_on_any_ranks(body)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_whole_call(reentrant):
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, labels = batch(LENGTHS)
        dummy = torch.ones((), dtype=torch.float64, requires_grad=True)

        def call(scale):
            return scale * model(tokens, labels=labels, lengths=LENGTHS).loss

        checkpoint(call, dummy, use_reentrant=reentrant).backward()
        return torch.cat([those(model), dummy.grad.view(1)])

    same_on_any_ranks(body)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_all_that_is_trained_lies_in_recomputed_layers(reentrant):
    """As adapters do: the head is frozen, and nothing but recomputation reaches a parameter."""

    def body(group):
        inner = tiny(reentrant=reentrant)
        inner.embed.requires_grad_(False)
        inner.head.requires_grad_(False)
        inner.embed.register_forward_hook(lambda module, inputs, out: out.requires_grad_())
        loss_of(sequence_parallel(inner, group=group)).backward()
        return those(inner)

    same_on_any_ranks(body)


@quiet
def test_unfreezing_between_forward_and_recomputation_is_refused():
    """On one device the layer would be trained; nobody would sum what it gets."""

    def body(group):
        inner = tiny(reentrant=True)
        inner.mixers[1].out.requires_grad_(False)
        loss = loss_of(sequence_parallel(inner, group=group))
        inner.mixers[1].out.requires_grad_(True)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .* was frozen in forward"):
            loss.backward()
        assert all(isinstance(p, nn.Parameter) for p in inner.parameters())

    run_ranks(2, body)


# one module by two paths


@pytest.mark.parametrize("reentrant", [None, True])
@quiet
def test_one_module_by_two_paths_keeps_its_parameters(reentrant):
    def body(group):
        inner = tiny(reentrant=reentrant)
        inner.mixers[2] = inner.mixers[0]
        inner.mixers[3].out.weight = inner.mixers[1].out.weight
        inner.again = inner.head
        parameters = list(inner.parameters())
        model = sequence_parallel(inner, group=group)
        optimizer = torch.optim.SGD(parameters, 0.1)
        for seed in range(3):
            loss_of(model, seed).backward()
            assert all(a is b and isinstance(b, nn.Parameter) for a, b in zip(parameters, inner.parameters()))
            if seed:
                optimizer.step()
        norm = nn.utils.clip_grad_norm_(inner.parameters(), 1e9)
        return torch.cat([those(inner), norm.view(1)])

    same_on_any_ranks(body)


def test_recurrent_modules_of_torch():
    """They keep their weights a second time, in a list."""

    class Recurrent(TinyLM):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(8, 8, batch_first=True)

        def forward(self, tokens, cut):
            x = self.embed(tokens)
            out, _ = self.cell(x.reshape(-1, 1, 8))  # one token at a time, so nothing crosses
            return self.head(self.mixers[1](out.view_as(x), cut))

    def body(group):
        inner = drawn(Recurrent().double())
        loss_of(sequence_parallel(inner, group=group)).backward()
        weights = inner.cell._flat_weights
        assert all(a is b for a, b in zip(weights, inner.cell.parameters()))
        return those(inner)

    same_on_any_ranks(body)


def test_an_error_in_backward_leaves_the_parameters_where_they_were():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise MemoryError("in backward")

    def body(group):
        inner = tiny()
        hook = inner.mixers[1].register_forward_hook(lambda module, inputs, out: Breaks.apply(out))
        before = list(inner.parameters())
        model = sequence_parallel(inner, group=group)
        with pytest.raises(MemoryError):
            loss_of(model).backward()
        assert all(a is b for a, b in zip(before, inner.parameters()))
        hook.remove()
        inner.zero_grad()
        loss_of(model).backward()
        return those(inner)

    same_on_any_ranks(body)


# hooks, optimizers, other weights


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_users_see_sums_and_change_them(when):
    """Whether they were there before the first wrapped call or came later; a hook that is not linear tells."""

    def body(group):
        inner = tiny()
        model = sequence_parallel(inner, group=group)
        if when == "after":
            loss_of(model, 5)
        calls = []
        inner.head.weight.register_hook(lambda grad: calls.append(1) or grad.square())
        loss_of(model).backward()
        assert len(calls) == 1
        return those(inner)

    same_on_any_ranks(body)


def test_what_nothing_reaches_has_no_gradient_afterwards_though_a_hook_looks_at_it():
    def body(group):
        inner = tiny()
        inner.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
        seen = []
        inner.spare.register_hook(lambda grad: seen.append(grad.clone()))
        loss_of(sequence_parallel(inner, group=group)).backward()
        return inner.spare.grad is None, all(not each.any() for each in seen)

    for size in (1, 2):
        assert run_ranks(size, body) == [(True, True)] * size


@pytest.mark.parametrize("reentrant", [None, False, True])
@quiet
def test_optimizers_that_step_inside_backward(reentrant):
    def body(group):
        inner = tiny(reentrant=reentrant)

        def step(parameter):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad + parameter.grad.square()
            parameter.grad = None

        for parameter in inner.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        model = sequence_parallel(inner, group=group)
        for seed in range(2):
            loss_of(model, seed).backward()
        return torch.cat([p.detach().flatten() for p in inner.parameters()])

    same_on_any_ranks(body)


def test_fast_weights_to_the_first_order():
    """MAML: weights after a step, by ``functional_call`` around the wrapper; gradients reach where they came from."""

    def body(group):
        model = sequence_parallel(tiny(), group=group)
        names, weights = zip(*model.named_parameters())
        inner = torch.autograd.grad(loss_of(model), weights)
        fast = {name: weight - 0.1 * grad for name, weight, grad in zip(names, weights, inner)}
        tokens, labels = batch(LENGTHS, 1)
        functional_call(model, fast, (tokens,), {"labels": labels, "lengths": LENGTHS}).loss.backward()
        return those(model)

    same_on_any_ranks(body)


def test_fast_weights_to_the_second_order_are_refused():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        names, weights = zip(*model.named_parameters())
        inner = torch.autograd.grad(loss_of(model), weights, create_graph=True)
        fast = {name: weight - 0.1 * grad for name, weight, grad in zip(names, weights, inner)}
        tokens, labels = batch(LENGTHS, 1)
        loss = functional_call(model, fast, (tokens,), {"labels": labels, "lengths": LENGTHS}).loss
        with pytest.raises(ValueError, match="sequence_parallel: its gradients cannot be differentiated again"):
            loss.backward()

    run_ranks(2, body)


def test_a_penalty_on_a_gradient_is_refused():
    """Also when it is a term of a loss, where torch would not miss it."""

    def body(group, ask):
        model = sequence_parallel(tiny(), group=group)
        weight = model.module.head.weight
        loss = loss_of(model)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        total = loss + grad.square().sum()
        with pytest.raises(ValueError, match="sequence_parallel: its gradients cannot be differentiated again"):
            total.backward() if ask == "backward" else torch.autograd.grad(total, weight)

    for ask in ("backward", "grad"):
        run_ranks(2, body, ask)


# what leaves the wrapper


@pytest.mark.parametrize("loss_tokens", [0, 3])
@pytest.mark.parametrize("sync", [True, False])
def test_any_loss_on_what_the_model_returned(loss_tokens, sync):
    """A term on the logits beside the loss, and a tiled loss. Without sync the mean over ranks counts."""

    class Tiled(TinyLM):
        def hidden(self, tokens, cut):
            x = self.embed(tokens)
            for mixer in self.mixers:
                x = mixer(x, cut)
            return x

    def body(group):
        inner = drawn(Tiled().double())
        model = sequence_parallel(inner, group=group, sync_gradients=sync, loss_tokens=loss_tokens)
        tokens, labels = batch(LENGTHS)
        out = model(tokens, labels=labels, lengths=LENGTHS)
        term = 0 if loss_tokens else out.logits.square().sum()
        (0.5 * out.loss + 0.01 * term).backward()
        found = those(inner)
        return found if sync else group.all_reduce(found).wait() / group.size

    same_on_any_ranks(body)


@pytest.mark.parametrize("sync", [True, False])
def test_logits_may_be_changed_in_place(sync):
    def body(group):
        inner = tiny()
        out = sequence_parallel(inner, group=group, sync_gradients=sync)(batch(LENGTHS)[0], lengths=LENGTHS)
        out.logits.mul_(0.5)
        out.logits.square().sum().backward()
        found = those(inner)
        return found if sync else group.all_reduce(found).wait() / group.size

    same_on_any_ranks(body)


@pytest.mark.parametrize("sync", [True, False])
def test_models_that_return_more_than_logits(sync):
    class Two(TinyLM):
        def forward(self, tokens, cut):
            logits = super().forward(tokens, cut)
            return {"logits": logits, "sizes": [logits.square(), tokens], "word": "kept"}

    def body(group):
        inner = drawn(Two().double())
        out = sequence_parallel(inner, group=group, sync_gradients=sync)(batch(LENGTHS)[0], lengths=LENGTHS).outputs
        assert out["word"] == "kept"
        (out["logits"].sum() + out["sizes"][0].sum()).backward()
        found = those(inner)
        return found if sync else group.all_reduce(found).wait() / group.size

    same_on_any_ranks(body)


def test_an_output_is_a_tree_of_tensors():
    """DDP(static_graph=True) finds the first reduction's place by it."""
    out = sequence_parallel(tiny(), group=alone())(batch([26])[0], labels=batch([26])[1])
    leaves, structure = pytree.tree_flatten(out)
    assert [each is found for each, found in zip((out.loss, out.logits), leaves)] == [True, True]
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, Output)
    assert again.shard is out.shard


def test_wrapping_twice_is_refused():
    model = sequence_parallel(tiny(), group=alone())
    with pytest.raises(ValueError, match=r"rank 0 of 1: the model is wrapped already"):
        sequence_parallel(model, group=alone())
    outer = nn.Sequential(nn.Identity(), model)
    with pytest.raises(ValueError, match=r"its part '1' is wrapped already"):
        sequence_parallel(outer, group=alone())


# the sum itself


@pytest.mark.parametrize("bucket", [1, 7, 1 << 22])
def test_sums_of_all_kinds_of_tensors(bucket, monkeypatch):
    monkeypatch.setattr(sums, "BUCKET", bucket)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape, dtype=torch.float64):
        return torch.randn(3, *shape, generator=generator, dtype=dtype)

    stacks = [randn(2, 3), randn(0), randn(5).bfloat16(), randn(4, dtype=torch.complex64), randn(), randn(4, 3)]
    stacks.append(randn(3, dtype=torch.complex128).conj())
    like = [stack[0].resolve_conj() for stack in stacks]
    like[5] = torch.empty(3, 4, dtype=torch.float64).t()

    def body(group):
        mine = [stack[group.rank] for stack in stacks]
        mine[0] = mine[0].expand(2, 3) if group.rank else None
        kept = [None if each is None else each.clone() for each in mine]
        found = sum_over_ranks([*mine, None], [*like, torch.zeros(3)], group)
        assert all(a is None or torch.equal(a, b) for a, b in zip(mine, kept)), "a gradient was overwritten"
        again = sum_over_ranks([*kept, None], [*like, torch.zeros(3)], group, overwrite=[True] * (len(kept) + 1))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again))
        return found

    for *found, none in run_ranks(3, body):
        assert none is None
        for number, (got, stack) in enumerate(zip(found, stacks)):
            whole = (stack[1:] if number == 0 else stack).to(torch.promote_types(stack.dtype, torch.float64)).sum(0)
            assert got.dtype == stack.dtype
            limit = {torch.bfloat16: 2**-8, torch.complex64: 1e-6}.get(stack.dtype, 1e-14)
            assert (got.to(whole.dtype) - whole).norm() <= limit * whole.norm()


def test_sparse_gradients_are_refused_on_every_rank():
    def body(group):
        inner = tiny()
        inner.embed = nn.Embedding(11, 8, sparse=True, dtype=torch.float64)
        nn.init.ones_(inner.embed.weight)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: the gradient of embed\.weight is sparse"):
            loss_of(sequence_parallel(inner, group=group)).backward()

    run_ranks(2, body)


def test_ranks_that_train_other_parameters_are_refused_before_anything_is_summed():
    """Of one shape, of other shapes, and of other numbers of parameters."""
    for frozen in ("mixers.0.out.weight", "head.bias"):

        def body(group, frozen=frozen):
            inner = tiny()
            inner.get_parameter(frozen if group.rank else "mixers.1.out.weight").requires_grad_(False)
            with pytest.raises(ValueError, match=r"different parameters|must be the same on every rank"):
                loss_of(sequence_parallel(inner, group=group)).backward()
            return all(p.grad is None for p in inner.parameters())

        assert run_ranks(2, body) == [True, True]


class Most(TorchDispatchMode):
    """The most bytes that tensors made within it had together, apart from ``known`` ones."""

    def __init__(self, known):
        super().__init__()
        self.most, self.alive = 0, {}
        self.known = {each.untyped_storage().data_ptr() for each in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.layout == torch.strided:
                self.see(each.untyped_storage())
        return result

    def see(self, storage):
        alive = {pointer: entry for pointer, entry in self.alive.items() if not entry[0].expired()}
        if storage.data_ptr() not in self.known:
            alive[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.alive = alive
        self.most = max(self.most, sum(bytes_ for _, bytes_ in alive.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_needs_a_few_buckets_whatever_the_model(dtype, monkeypatch):
    """Memory beyond the gradients themselves; 17 bytes a parameter before."""
    monkeypatch.setattr(sums, "BUCKET", 1 << 10)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 64)
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(30))
            self.head = nn.Linear(64, 11)

        def forward(self, tokens, cut):
            x = self.embed(tokens)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    def body(group):
        inner = drawn(Wide()).to(dtype)
        inner.embed.weight.requires_grad_(True)
        loss = loss_of(sequence_parallel(inner, group=group), lengths=[4])
        with Most(inner.parameters()) as counted:
            loss.backward()
        gradients_bytes = sum(p.grad.nbytes for p in inner.parameters())
        return counted.most - gradients_bytes

    bucket_bytes = 4 << 10
    for beyond in run_ranks(2, body):
        assert beyond <= 8 * bucket_bytes + 40_000, beyond  # and activations of 8 tokens


def test_a_gradient_that_another_holds_is_not_overwritten():
    """Two parameters and an outer leaf get one and the same tensor as their gradient."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.full((2, 26, 11), n, dtype=torch.float64)) for n in range(3))

        def forward(self, tokens, cut):
            rows = [cut.shard.take(each) for each in (self.a, self.b)]
            return rows[0] + rows[1] + self.c[:, : cut.shard.num_local] * 2

    def body(group):
        inner = Shared()
        out = sequence_parallel(inner, group=group)(batch(LENGTHS)[0], lengths=LENGTHS)
        other = torch.zeros_like(out.logits, requires_grad=True)
        (out.logits + other).square().sum().backward()
        whole = out.shard.gather(other.grad)
        return torch.cat([inner.a.grad.flatten(), inner.b.grad.flatten(), whole.flatten()])

    same_on_any_ranks(body)


def test_copies_and_pickled_states_hold_nothing_of_a_step():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        loss_of(model).backward()
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        twin = copy.deepcopy(model)
        twin.zero_grad()
        loss_of(twin, 1).backward()
        return gradients(twin)

    same_on_any_ranks(body)


def test_mixers_alone_are_still_modules():
    """Aliases stand in a place for the time of a call only, in evaluation not at all."""
    mixer = Mixer(softmax=False).double()
    with torch.no_grad():
        model = sequence_parallel(tiny(), group=alone())
        loss_of(model)
    assert isinstance(mixer.out.weight, nn.Parameter)
