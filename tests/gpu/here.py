"""Where the tests of this folder run, and how large."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)

only_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def sized(large, small):
    """``large`` on a GPU, ``small`` in the interpreter."""
    return large if ON_GPU else small
