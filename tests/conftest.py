"""``@pytest.mark.spmd(1, 2, 4)``: the hooks that run one test body once per rank. See ``tests/worlds``."""

import os

import torch

from tests.worlds import pytest_addoption as pytest_addoption
from tests.worlds import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.worlds import pytest_configure as pytest_configure
from tests.worlds import pytest_generate_tests as pytest_generate_tests
from tests.worlds import pytest_ignore_collect as pytest_ignore_collect
from tests.worlds import pytest_pyfunc_call as pytest_pyfunc_call
from tests.worlds import pytest_sessionfinish as pytest_sessionfinish

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: kernels run on CPU tensors
