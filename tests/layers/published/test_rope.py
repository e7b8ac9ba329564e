"""Rotary positions of published checkpoints are those of transformers' formulas, and turn what they should."""

import math

import pytest
import torch

from seqpar.layers.parts.rope import Rope, rotary

DIM, BASE, TRAINED = 16, 10000.0, 64


def turned(rope, x, positions):
    """Channel by channel, by complex numbers."""
    count = len(rope.inv_freq)
    out = x.clone()
    for t, position in enumerate(positions.tolist()):
        for i, freq in enumerate(rope.inv_freq):
            first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + count)
            turn = rope.factor * complex(math.cos(position * freq), math.sin(position * freq))
            pair = torch.complex(x[:, t, :, first], x[:, t, :, second]) * turn
            out[:, t, :, first], out[:, t, :, second] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_pairs_turn_and_the_rest_stays(dim, interleaved):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    positions = torch.tensor([0, 7, 3, 100, 5])
    rope = Rope(Rope.plain(dim, interleaved=interleaved).inv_freq, 1.3, interleaved)
    assert (rope(x, positions) - turned(rope, x, positions)).abs().max() < 1e-13
    assert rope(x.bfloat16(), positions).dtype == torch.bfloat16


def test_a_plain_rope_is_rotary():
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    assert torch.equal(Rope.plain(8, 500.0)(x, torch.arange(4)), rotary(x, torch.arange(4), 500.0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="even dim"):
        Rope.plain(5)
    with pytest.raises(ValueError, match="do not fit heads of 4"):
        rotary_of_eight = Rope.plain(8)
        rotary_of_eight(torch.zeros(1, 1, 1, 4), torch.arange(1))


SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
YARN = {"beta_fast": 32, "beta_slow": 1}
CASES = {
    "linear": ({"factor": 4.0}, Rope.plain(DIM, BASE).scaled(4.0)),
    "dynamic": ({"factor": 4.0}, Rope.dynamic(DIM, BASE, 4.0, TRAINED, 200)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        Rope.plain(DIM, BASE).llama3(8.0, 1.0, 4.0, TRAINED),
    ),
    "yarn": ({"factor": 8.0, **YARN}, Rope.yarn(DIM, BASE, 8.0, TRAINED)),
    "yarn, deepseek": (
        {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        Rope.yarn(DIM, BASE, 8.0, TRAINED, mscale=1.0, mscale_all_dim=0.7),
    ),
    "yarn, gpt-oss": ({"factor": 8.0, "truncate": False}, Rope.yarn(DIM, BASE, 8.0, TRAINED, truncate=False)),
    "longrope": (
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG},
        Rope.plain(DIM, BASE).longrope(LONG, 4.0, TRAINED),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_computes_them(name):
    """fp32 there: angles of one position agree to its precision."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, rope = CASES[name]
    kind = name.split(",")[0]
    parameters = {"rope_type": kind, "rope_theta": BASE, "original_max_position_embeddings": TRAINED, **parameters}
    longest = TRAINED if kind == "dynamic" else 4 * TRAINED
    config = transformers.LlamaConfig(
        hidden_size=2 * DIM, num_attention_heads=2, head_dim=DIM, max_position_embeddings=longest,
        rope_parameters=parameters,
    )  # fmt: skip
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=200)
    assert rope.inv_freq == pytest.approx(inv_freq.tolist(), rel=2e-6)
    assert rope.factor == pytest.approx(factor, rel=1e-6)
