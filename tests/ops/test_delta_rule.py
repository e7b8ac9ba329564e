"""The delta rule in stages equals the token-by-token loop: outputs, states and every gradient."""

from dataclasses import replace

import pytest
import torch

from seqpar.ops.delta_rule import DeltaRule
from tests.ops.delta_cases import KINDS, SCALE, Case, errors, make, staged

OP = DeltaRule(scale=SCALE, impl="reference")
TOKENS = (0, 1, 15, 16, 17, 63, 64, 65, 100)
STARTS = {
    "fresh": (0,),
    "middle": (37,),
    "tiny": tuple(range(2, 200, 3)),
    "one by one": tuple(range(130)),
    "in one chunk": (0, 70, 71, 90),
    "at the edges": (16, 64, 128),
    "last token": (129,),
}


def check(case: Case, tolerance: float = 1e-12, op=OP) -> None:
    wrong = {name: error for name, error in errors(case, staged(op, case)).items() if not error <= tolerance}
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", TOKENS)
def test_any_number_of_tokens(kind, t):
    check(make(kind, t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_documents_do_not_mix(kind, starts):
    check(make(kind, 130, starts))


if __name__ == "__main__":
    for kind in KINDS:
        for t in TOKENS:
            case = make(kind, t)
            print(kind, t, {k: f"{v:.1e}" for k, v in errors(case, staged(OP, case)).items()})
        for name, starts in STARTS.items():
            case = make(kind, 130, starts)
            print(kind, name, {k: f"{v:.1e}" for k, v in errors(case, staged(OP, case)).items()})
