"""Which cases of a wide test an ordinary run takes: one in so many, chosen by their names, so that all runs agree."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from zlib import crc32

import pytest


def left_to_the_night(items: Sequence[pytest.Item], one_in: int) -> Iterator[pytest.Item]:
    """Of each test's cases all but one in ``one_in``, times what its mark ``sampled`` says; one case always stays."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("sampled")
        each = one_in * (mark.args[0] if mark else 1)
        cases.sort(key=lambda item: crc32(item.nodeid.encode()))
        yield from cases[-(-len(cases) // each) :]
