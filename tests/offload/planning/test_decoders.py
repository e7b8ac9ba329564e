"""Shapes by name against the published arithmetic: bytes a layer, times, and lengths from which all hides."""

import re

import pytest

from seqpar.offload.planning.decoders import (
    DECODERS,
    GPUS,
    decoder,
    gpu,
    hides_from,
    machine_of,
    profile_of,
    skeletal_bytes,
)

K, GIB = 1024, 2**30
H100 = gpu("h100")


def test_memos_arithmetic_of_7b_at_a_million_tokens_on_eight_devices():
    shape, million = decoder("gpt-7b"), K * K
    assert skeletal_bytes(shape, million) == 128 * GIB
    assert shape.layers * skeletal_bytes(shape, million) == 4096 * GIB
    layer = profile_of(shape, million, 8, H100)
    assert layer.layer_bytes * 8 == 128 * GIB and layer.tokens == million // 8
    always = sum(tensor.bytes_per_token * layer.tokens for tensor in layer.saved if tensor.must_swap)
    assert always / layer.layer_bytes == 1 / 8


@pytest.mark.parametrize("shape", DECODERS[:4], ids=lambda shape: shape.name)
def test_a_gpt_layer_saves_16_widths_and_weighs_12_squares(shape):
    units = {tensor.name: tensor.bytes_per_token / 2 / shape.width for tensor in profile_of(shape, 8, 1, H100).saved}
    assert units == {
        "input": 1, "attention_norm": 1, "query": 1, "key": 1, "value": 1, "attention": 1, "residual": 1,
        "mlp_norm": 1, "up": 4, "activation": 4,
    }  # fmt: skip
    assert shape.layer_parameters == 12 * shape.width**2 and shape.width % shape.heads == 0


def test_llama_8b_shares_keys_and_gates_its_feed_forward():
    shape = decoder("llama-8b")
    units = {tensor.name: tensor.bytes_per_token / 2 / shape.width for tensor in profile_of(shape, 8, 1, H100).saved}
    assert units == {
        "input": 1, "attention_norm": 1, "query": 1, "key": 0.25, "value": 0.25, "attention": 1, "residual": 1,
        "mlp_norm": 1, "gate": 3.5, "up": 3.5, "activation": 3.5,
    }  # fmt: skip
    assert sum(units.values()) == 17 and shape.layer_parameters == 13 * shape.width**2


# Thousands of tokens at 12, 25, 50 and 55 GB/s for each achieved rate: the table of what 16 units need.
HIDES = [
    ("gpt-7b", 350e12, (408, 171, 61, 51)),
    ("gpt-7b", 450e12, (538, 233, 93, 80)),
    ("gpt-7b", 550e12, (668, 296, 124, 108)),
    ("llama-8b", 450e12, (534, 229, 89, 76)),
    ("gpt-13b", 450e12, (526, 221, 81, 68)),
    ("gpt-65b", 450e12, (490, 185, 45, 32)),
]


@pytest.mark.parametrize(("name", "flops", "expected"), HIDES)
def test_sixteen_units_hide_from_the_known_lengths(name, flops, expected):
    for bandwidth, thousand in zip((12e9, 25e9, 50e9, 55e9), expected):
        card = type(H100)("card", flops, bandwidth, H100.memory_bytes_per_second, 80e9)
        assert round(hides_from(16, decoder(name), card) / K) == thousand


@pytest.mark.parametrize(("name", "units", "thousand"), [("gpt-7b", 10, 40), ("llama-8b", 11.5, 49)])
def test_without_what_is_rebuilt_elementwise_they_hide_from_less_than_half(name, units, thousand):
    assert round(hides_from(units, decoder(name), H100) / K) == thousand
    layer = profile_of(decoder(name), 8, 1, H100)
    rest = sum(tensor.bytes_per_token for tensor in layer.saved if not tensor.elementwise)
    assert rest / 2 / decoder(name).width == units


def test_input_and_attention_output_always_hide_on_an_h100():
    assert all(hides_from(2, shape, H100) < 0 for shape in DECODERS)


def test_the_a800_gives_memos_192k():
    assert round(hides_from(16, decoder("gpt-7b"), gpu("a800")) / K) == 192


@pytest.mark.parametrize("shape", DECODERS, ids=lambda shape: shape.name)
def test_forward_is_the_work_of_its_products_and_of_causal_attention(shape):
    """Count multiply-adds product by product, and attention pair by pair."""
    tokens, devices = 96, 4
    head = shape.width // shape.heads
    kv = head * shape.kv_heads
    ways_in = 3 if shape.gated else 2
    each = shape.width * (shape.width + 2 * kv) + shape.width * shape.width + ways_in * shape.width * shape.ffn
    products = 2 * tokens * each
    pairs = sum(1 for query in range(tokens) for key in range(tokens) if key < query) + tokens / 2
    attention = 2 * (2 * pairs * head) * shape.heads
    layer = profile_of(shape, tokens, devices, H100)
    assert layer.forward_seconds == pytest.approx((products + attention) / (devices * 450e12), rel=1e-12)
    assert layer.attention_seconds == pytest.approx(attention / (devices * 450e12), rel=1e-12)
    assert layer.backward_seconds == 2 * layer.forward_seconds


@pytest.mark.parametrize("shape", DECODERS, ids=lambda shape: shape.name)
def test_all_recompute_of_products_is_a_forward_without_its_last_product_and_its_attention(shape):
    layer = profile_of(shape, 4096, 1, H100)
    again = sum(t.recompute_seconds_per_token for t in layer.saved if not t.elementwise and not t.must_swap)
    down = 2 * shape.width * shape.ffn / 450e12
    rest = (layer.forward_seconds - layer.attention_seconds) / 4096 - down
    assert again == pytest.approx(rest, rel=1e-12)


def test_elementwise_work_costs_little_but_not_nothing():
    layer = profile_of(decoder("gpt-7b"), 4096, 1, H100)
    cheap = [t.recompute_seconds_per_token / t.bytes_per_token for t in layer.saved if t.elementwise]
    dear = [t.recompute_seconds_per_token / t.bytes_per_token for t in layer.saved if not t.elementwise][1:]
    assert 0 < max(cheap) < 0.1 * min(seconds for seconds in dear if seconds)


def test_packed_documents_have_the_attention_of_their_effective_length():
    shape, lengths = decoder("llama-8b"), [1000, 3000, 500]
    packed = profile_of(shape, 4500, 3, H100, lengths=lengths)
    alone = [profile_of(shape, length, 3, H100) for length in lengths]
    ragged = sum(each.attention_seconds * (length / 3) / each.tokens for each, length in zip(alone, lengths))
    assert packed.attention_seconds == pytest.approx(ragged, rel=1e-12)
    assert packed.context == sum(length**2 for length in lengths) / 4500


def test_tokens_that_do_not_divide_fall_to_the_fullest_device():
    assert profile_of(decoder("gpt-7b"), 1001, 8, H100).tokens == 126


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: decoder("gpt-8b"),
            "no model 'gpt-8b', did you mean 'gpt-7b'?; known are gpt-7b, gpt-13b, gpt-30b, gpt-65b",
        ),
        (lambda: gpu("b300"), "no GPU 'b300'; known are A100-40G, A100-80G, A800-80G"),
        (lambda: gpu("a100"), "GPU 'a100' may be A100-40G or A100-80G: say which"),
        (lambda: profile_of(DECODERS[0], 0, 8, H100), "tokens is a whole number >= 1, got 0"),
        (lambda: profile_of(DECODERS[0], 5, 0, H100), "devices is a whole number >= 1, got 0"),
        (lambda: profile_of(DECODERS[0], 5, 1, H100, lengths=[2, 2]), "4 tokens in all, expected 5"),
    ],
)
def test_what_there_is_not_is_named(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_a_machine_of_a_gpu_has_its_link_both_ways_and_its_memory():
    for card in GPUS:
        host = machine_of(card, host_bytes=5.0)
        assert host.d2h_bytes_per_second == host.h2d_bytes_per_second == card.link_bytes_per_second
        assert (host.device_bytes, host.devices_per_host, host.host_bytes) == (card.memory_bytes, 8, 5.0)
