"""Ranks as threads of this process."""

from typing import Any

import pytest

from seqpar.collectives import Group, run_ranks
from tests.worlds.body import MESSAGE_SECONDS, Body


class Threads:
    max_size = 1000

    def run(self, size: int, body: Body, arguments: dict[str, Any]) -> None:
        function = body.function()

        def on_rank(group: Group) -> None:
            function(group=group, **arguments)

        run_ranks(size, on_rank, timeout_seconds=MESSAGE_SECONDS)

    def close(self, session: pytest.Session) -> None:
        pass
