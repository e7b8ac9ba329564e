"""Tiny models of transformers for tests, and what they give for each document alone."""

import copy
import functools
import threading

import torch

from bench.models.hf.measure import LENGTHS, Numbers, alone
from bench.models.hf.shrink import built, shrunk
from seqpar.hf import Exact

LOCK = threading.Lock()


def tiny(model_type, vocab_size=64):
    """A shrunk model in fp64, all of whose numbers are drawn: the same for every rank."""
    with LOCK:  # ranks are threads, and draw from one generator
        return copy.deepcopy(_tiny(model_type, vocab_size))


@functools.cache
def _tiny(model_type, vocab_size):
    config = shrunk(model_type)
    config.vocab_size = vocab_size
    return built(config)


def tokens_of(model, lengths=LENGTHS, rows=2):
    """Tokens ``[rows, s]``, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, sum(lengths)), generator=generator)


def expected(model, tokens):
    """Loss, logits and gradients of transformers itself, in fp64."""
    with Exact():
        return alone(model, tokens)


def trained(wrapped, model, tokens, lengths=LENGTHS):
    """One forward and backward pass of a wrapped copy of ``model``."""
    with Exact():
        output = wrapped(tokens, labels=tokens, lengths=lengths)
        output.loss.backward()
        logits = output.shard.gather(output.logits.detach())
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return Numbers(output.loss.detach(), logits, found)


def twin(model):
    """A copy: every rank wraps its own."""
    return copy.deepcopy(model)
