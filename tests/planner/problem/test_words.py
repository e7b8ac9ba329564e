"""Numbers of tokens and names as people type them: one piece of code for files, arguments and names."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.commands.arguments import lengths, size
from seqpar.offload.planning.decoders import _pick
from seqpar.planner.problem.words import did_you_mean, pick, shortened, tokens_of

KNOWN = ("H100-80G", "H200-141G", "A100-40G", "A100-80G", "gpt-7b", "gpt-7b-192k")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("0", 0), ("5", 5), ("065", 65), ("4K", 4096), ("4k", 4096), (" 1M ", 2**20), ("999999999999999", 10**15 - 1)],
)
def test_words_of_tokens(word: str, expected: int) -> None:
    assert tokens_of(word) == size(word) == expected


@pytest.mark.parametrize(
    "word", ["", "K", "-5", "1.5M", "1e3", "4G", "4KK", "1_000", "\u0665", "0x10", "9" * 16, "999999999999M", "9" * 400]
)
def test_words_that_are_no_tokens_are_one_short_line(word: str) -> None:
    with pytest.raises(ValueError, match="such as 65536, 64K or 1M, got ") as refused:
        tokens_of(word)
    assert len(str(refused.value)) < 150
    for parse in (size, lengths):
        with pytest.raises(argparse.ArgumentTypeError, match=r"4K,64K|65536, 64K or 1M"):
            parse(word)


@given(st.integers(0, 10**8), st.sampled_from([("", 1), ("k", 1024), ("K", 1024), ("m", 1024**2), ("M", 1024**2)]))
def test_suffixes_multiply(number: int, suffix: tuple[str, int]) -> None:
    assert tokens_of(f"{number}{suffix[0]}") == number * suffix[1]


@pytest.mark.parametrize("picked", [pick, _pick], ids=["planner", "offload"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100-80G", "H100-80G"),
        ("h100", "H100-80G"),
        ("h2", "H200-141G"),
        ("a100-4", "A100-40G"),
        (" GPT-7B ", "gpt-7b"),  # a whole name goes before the beginning of a longer one
        ("gpt-7b-", "gpt-7b-192k"),
    ],
)
def test_names_in_any_case_and_by_their_beginning(picked, name: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert picked("GPU", name, KNOWN) == expected


@given(st.one_of(st.text(max_size=8), st.sampled_from(["h", "H100", "a100", "gpt-7", "gpt-8b", "h100_80g", "x" * 200])))
def test_both_rooms_pick_alike(name: str) -> None:
    """Neither may import the other: what one says, the other says."""

    def said(picked) -> str:  # type: ignore[no-untyped-def]
        try:
            return f"found {picked('GPU', name, KNOWN)}"
        except ValueError as error:
            return str(error)

    assert said(pick) == said(_pick)
    if not any(each.lower().startswith(name.strip().lower()) for each in KNOWN) or not name.strip():
        assert said(pick).startswith("no GPU ") and said(pick).endswith(f"; known are {', '.join(KNOWN)}")


def test_several_are_named_and_a_slip_is_answered() -> None:
    with pytest.raises(ValueError, match="GPU 'a100' may be A100-40G or A100-80G: say which"):
        pick("GPU", "a100", KNOWN)
    with pytest.raises(ValueError, match="no GPU 'H100-90G', did you mean 'H100-80G'"):
        pick("GPU", "H100-90G", KNOWN)
    assert did_you_mean("Llama-3-8B", ["gpt-7b", "llama-8b"]) == ", did you mean 'llama-8b'?"
    assert did_you_mean("abacus", KNOWN) == ""


def test_long_words_are_cut() -> None:
    assert shortened("x" * 60) == repr("x" * 60)
    assert len(shortened("x" * 100_000)) == 65
    with pytest.raises(ValueError) as refused:
        pick("GPU", "x" * 100_000, KNOWN)
    assert len(str(refused.value)) < 250
