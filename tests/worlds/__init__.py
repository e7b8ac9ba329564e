"""One test body, four worlds: a pytest plugin.

    @pytest.mark.spmd(1, 2, 4)
    def test_sum(group):
        assert group.all_reduce(torch.ones(1)).wait() == group.size

runs the body once per rank, in groups of 1, 2 and 4 ranks. ``--world`` says what a rank is:

    pytest                                                                  threads of this process
    pytest --world processes                                                a pool of processes
    torchrun --standalone --nproc-per-node 4 -m pytest --world torchrun     what torchrun started
    mpiexec -n 4 python -m pytest --world mpirun                            what mpiexec started

The last three run spmd tests only, the last two in the same order on every rank, and rank 0 reports. In every world a
rank that fails shows its own error, its peers do not wait for it, and the next test runs.

``@pytest.mark.sampled(4)``: of this test's cases one in four is in an ordinary run, the others are marked ``nightly``.
``--sampled 4`` does so for every test.
"""

import functools
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.worlds.body import Body, World
from tests.worlds.launched import Launched
from tests.worlds.processes import Processes
from tests.worlds.sample import left_to_the_night
from tests.worlds.threads import Threads

WORLD = pytest.StashKey[World]()
LAUNCHED = ("torchrun", "mpirun")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--world",
        choices=("threads", "processes", *LAUNCHED),
        default="threads",
        help="what the ranks of spmd tests are",
    )
    parser.addoption("--slow", action="store_true", help="run the tests that start jobs of several processes, too")
    parser.addoption("--nightly", action="store_true", help="run what repeats a test of the suite at length, too")
    parser.addoption("--sampled", type=int, default=1, metavar="N", help="leave all cases but one in N to --nightly")


@pytest.hookimpl(trylast=True)  # the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts jobs of several processes; runs with --slow")
    config.addinivalue_line("markers", "nightly: a test of the suite at length; runs with --nightly")
    config.addinivalue_line("markers", "sampled(n): an ordinary run takes one in n of its cases, --nightly all")
    name = config.getoption("--world")
    if name in LAUNCHED:
        config.stash[WORLD] = Launched(config)
        # Every rank must draw the same examples.
        hypothesis.settings.register_profile("in step", derandomize=True, database=None)
        hypothesis.settings.load_profile("in step")
    else:
        config.stash[WORLD] = Processes() if name == "processes" else Threads()
    if name == "mpirun" and not config.getoption("--only-mpi"):
        config.option.with_mpi = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("spmd")
    if marker is not None:
        metafunc.parametrize("group", marker.args, ids=[f"{size}ranks" for size in marker.args])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without spmd tests are not even imported where ranks are not threads."""
    is_test = collection_path.match("test_*.py") and config.getoption("--world") != "threads"
    return True if is_test and "spmd" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name, world = config.getoption("--world"), config.stash[WORLD]
    left = dict.fromkeys(left_to_the_night(items, config.getoption("--sampled")))
    for item in left:
        item.add_marker("nightly")
    if not config.getoption("--nightly"):
        config.hook.pytest_deselected(items=[*left])
        items[:] = [item for item in items if item not in left]
    for item in items:
        for kind in ("slow", "nightly"):
            if item.get_closest_marker(kind) and not config.getoption(f"--{kind}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{kind}"))
        if _size(item) > world.max_size:
            item.add_marker(pytest.mark.skip(reason=f"needs {_size(item)} ranks, this world has {world.max_size}"))
        if name == "mpirun" and _size(item):
            item.add_marker("mpi")
    if name != "threads":
        config.hook.pytest_deselected(items=[item for item in items if not _size(item)])
        items[:] = [item for item in items if _size(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    size = _size(pyfuncitem)
    if not size:
        return None
    world, body = pyfuncitem.config.stash[WORLD], Body.of(pyfuncitem)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if not body.is_hypothesis:
        del arguments["group"]
        world.run(size, body, arguments)
        return True

    handle = pyfuncitem.obj.hypothesis
    original = handle.inner_test

    @functools.wraps(original)
    def one_example(group: int, **drawn: Any) -> None:
        world.run(group, body, drawn)

    handle.inner_test = one_example
    try:
        pyfuncitem.obj(**arguments)
    finally:
        handle.inner_test = original
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[WORLD].close(session)


def _size(item: pytest.Item) -> int:
    """How many ranks an spmd test wants; 0 for another test."""
    callspec = getattr(item, "callspec", None)
    return callspec.params["group"] if callspec and item.get_closest_marker("spmd") else 0
