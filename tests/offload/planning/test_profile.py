"""Profiles of layers and machines: what they refuse, how they grow with length, and what a host has left."""

import math
import random
from fractions import Fraction

import pytest

from seqpar.offload.planning.profile import (
    LayerProfile,
    Machine,
    SavedTensor,
    at_context,
    at_length,
    available_bytes,
    bucket,
    cgroup_limit_bytes,
    effective_length,
)

INPUT = SavedTensor("input", 8.0, 0.0, must_swap=True)


def profile(**changes):
    fields = {"saved": (INPUT,), "forward_seconds": 3.0, "backward_seconds": 7.0, "tokens": 100, "layers": 4}
    return LayerProfile(**{**fields, **changes})


def machine(**changes):
    return Machine(**{"d2h_bytes_per_second": 50e9, "h2d_bytes_per_second": 40e9, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"saved": ()}, "need names"),
        ({"saved": (INPUT, INPUT)}, "each its own"),
        ({"forward_seconds": 0.0}, "forward_seconds is a number > 0, got 0.0"),
        ({"backward_seconds": math.nan}, "backward_seconds is a number > 0, got nan"),
        ({"tokens": -1}, "tokens is a whole number >= 1, got -1"),
        ({"tokens": 2.5}, "tokens is a whole number >= 1, got 2.5"),
        ({"layers": 0}, "layers is a whole number >= 1, got 0"),
        ({"resident_bytes": -1.0}, "resident_bytes is a number >= 0"),
        ({"context_tokens": math.inf}, "context_tokens"),
        ({"attention_seconds": 3.5}, "attention_seconds 3.5 is a part of forward_seconds 3.0"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        profile(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d2h_bytes_per_second": 0}, "d2h_bytes_per_second is a number > 0, got 0"),
        ({"h2d_bytes_per_second": math.inf}, "h2d_bytes_per_second"),
        ({"host_bytes": -5.0}, "host_bytes is a number >= 0, got -5.0"),
        ({"device_bytes": "80G"}, "device_bytes is a number >= 0, got '80G'"),
        ({"pinned": "rounded"}, "pinned is one of exact, power_of_two, got 'rounded'"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        machine(**changes)


@pytest.mark.parametrize("fields", [("x", 0.0, 1.0), ("x", 1.0, -1.0), ("x", math.nan, 1.0), ("x", 1.0, math.inf)])
def test_a_saved_tensor_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValueError, match="of 'x' is a number"):
        SavedTensor(*fields)


def test_at_another_length_attention_grows_with_the_square_and_the_rest_in_proportion():
    before = profile(attention_seconds=1.25, context_tokens=800.0)
    after = at_length(before, 250)
    linear, square = Fraction(7, 4) * Fraction(5, 2), Fraction(5, 4) * Fraction(25, 4)
    assert after.tokens == 250 and after.context == 2000.0 and after.layer_bytes == 2000.0
    assert after.forward_seconds == pytest.approx(float(linear + square), rel=1e-12)
    assert after.attention_seconds == pytest.approx(float(square), rel=1e-12)
    assert after.backward_seconds / after.forward_seconds == pytest.approx(7 / 3, rel=1e-12)
    back = at_length(after, 100)
    assert back.forward_seconds == pytest.approx(before.forward_seconds, rel=1e-12)


def test_with_another_context_only_attention_changes():
    before = profile(attention_seconds=1.0)
    after = at_context(before, 300.0)
    assert (after.tokens, after.layer_bytes) == (before.tokens, before.layer_bytes)
    assert (after.attention_seconds, after.forward_seconds, after.backward_seconds) == (3.0, 5.0, 7.0 * 5 / 3)


def test_the_context_of_one_document_is_its_length():
    assert profile().context == 100.0
    assert effective_length([4096]) == 4096.0


def test_many_documents_cost_the_attention_of_their_effective_length():
    lengths = [random.Random(seed).randint(1, 9000) for seed in range(20)]
    pairs = sum(sum(1 for _ in range(length)) * length for length in lengths)
    assert effective_length(lengths) * sum(lengths) == pytest.approx(pairs, rel=1e-12)
    assert effective_length([512] * 7) == 512.0


@pytest.mark.parametrize("lengths", [[], [0], [3, -1]])
def test_documents_without_tokens_have_no_effective_length(lengths):
    with pytest.raises(ValueError, match="sum of at least 1"):
        effective_length(lengths)


def test_a_bucket_is_never_below_its_tokens_nor_more_than_an_eighth_above():
    for tokens in [*range(1, 3000), 2**20 - 1, 2**20, 2**20 + 1]:
        assert tokens <= bucket(tokens) <= tokens * 1.125
        assert bucket(bucket(tokens)) == bucket(tokens)
    buckets = [bucket(tokens) for tokens in range(1, 3000)]
    assert buckets == sorted(buckets)
    assert len({bucket(tokens) for tokens in range(1025, 2049)}) == 8


@pytest.mark.parametrize("tokens", [0, -4, 2.0, True, "8"])
def test_a_bucket_is_of_whole_tokens(tokens):
    with pytest.raises(ValueError, match="tokens is a whole number >= 1"):
        bucket(tokens)


def test_the_host_is_shared_and_the_lower_limit_counts():
    assert machine(host_bytes=800.0, devices_per_host=8).host_share_bytes == 100.0
    assert machine(host_bytes=800.0, cgroup_bytes=400.0, devices_per_host=4).host_share_bytes == 100.0
    assert machine().host_share_bytes == math.inf


@pytest.mark.parametrize(("host", "pool"), [(128.0, 128.0), (127.0, 64.0), (200.0, 128.0), (0.5, 0.0), (0.0, 0.0)])
def test_a_pool_that_is_rounded_up_must_still_fit(host, pool):
    assert machine(host_bytes=host, pinned="power_of_two").host_pool_bytes == pool
    assert machine(host_bytes=host).host_pool_bytes == host


def test_an_endless_host_has_an_endless_pool():
    assert machine(pinned="power_of_two").host_pool_bytes == math.inf


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, math.inf),
        ({"sys/fs/cgroup/memory.max": "max\n"}, math.inf),
        ({"sys/fs/cgroup/memory.max": "1073741824\n"}, 2.0**30),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, math.inf),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"}, 4096.0),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "7"}, 7.0),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/x/memory.max": "12", "sys/fs/cgroup/memory.max": "9"}, 9.0),
        ({"proc/self/cgroup": "4:cpu,memory:/d\n", "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "55"}, 55.0),
        ({"proc/self/cgroup": "nonsense\n4:cpu:/d\n", "sys/fs/cgroup/d/memory.max": "55"}, math.inf),
    ],
)  # fmt: skip
def test_the_lowest_limit_of_the_control_groups_above_us_counts(tmp_path, files, limit):
    for name, words in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(words)
    assert cgroup_limit_bytes(tmp_path) == limit


def test_available_memory_is_what_the_kernel_says(tmp_path):
    assert available_bytes(tmp_path) == math.inf
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       100 kB\nMemFree: 3 kB\nMemAvailable:    42 kB\n")
    assert available_bytes(tmp_path) == 42 * 1024
