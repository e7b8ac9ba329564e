"""Reading document lengths from a file or standard input: numbers of tokens, one a line or with commas between."""

from collections.abc import Iterator

from seqpar.planner.problem.texts import read_text
from seqpar.planner.problem.words import shortened, tokens_of


def read_lengths(source: str) -> tuple[int, ...]:
    """The lengths in a file, or on standard input for ``-``: whole numbers, or such as 64K and 1M.

    Raises ``ValueError`` that says which line is wrong.
    """
    name = "standard input" if source == "-" else shortened(source)[1:-1]
    lengths = tuple(_numbers(read_text(source, name, "document lengths, one a line"), name))
    if not lengths:
        raise ValueError(f"{name} is empty: expected document lengths, whole numbers of tokens, one a line")
    return lengths


def _numbers(text: str, name: str) -> Iterator[int]:
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.replace(",", " ").split():
            try:
                found = tokens_of(word)
            except ValueError:
                found = 0
            if found < 1:
                raise ValueError(
                    f"{name}, line {number}: expected a whole number of tokens, at least 1, such as 65536, 64K or 1M, "
                    f"got {shortened(word)}"
                )
            yield found
