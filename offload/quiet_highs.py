"""HiGHS as PuLP's solver, that never writes to standard output."""

import functools
from collections.abc import Mapping
from typing import Any


def quiet_highs(options: Mapping[str, float]) -> Any:
    """PuLP's solver ``HiGHS`` with these options of HiGHS, by their names there."""
    import pulp  # before highspy: PuLP 4 loads HiGHS in a way that both can share

    solver = pulp.HiGHS(msg=False)
    solver.createAndConfigureSolver = functools.partial(_create, options)
    return solver


def _model(options: Mapping[str, float]) -> Any:
    """An empty model of HiGHS with these options, that does not write one byte to file descriptor 1.

    HiGHS 1.16 heads its log with two lines when its Python class switches its callbacks on, in the constructor, which
    is before any option can be set: so the log is switched off between the two. Nothing is redirected, as descriptors
    belong to all threads of the process.
    """
    model = _quiet_class()()
    for name, value in {"output_flag": False, **options}.items():
        model.setOptionValue(name, value)
    return model


def _create(options: Mapping[str, float], problem: Any) -> None:
    problem.solverModel = _model(options)


@functools.cache
def _quiet_class() -> Any:
    import highspy

    class Quiet(highspy.Highs):  # type: ignore[misc, unused-ignore]
        def enableCallbacks(self) -> None:  # noqa: N802 - the name that HiGHS calls
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Quiet
