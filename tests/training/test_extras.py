"""Fused parts come from NVIDIA apex where it is, from torch otherwise, and give the same numbers."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar.layers import RMSNorm
from seqpar.training import extras


@pytest.fixture(autouse=True)
def look_again() -> Iterator[None]:
    """What was found is remembered: not from one test to the next."""
    extras.find_apex.cache_clear()
    yield
    extras.find_apex.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], summary: str | None) -> None:
    """As if exactly these of apex's modules were installed, under a package of that summary."""
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name in ("apex", extras.NORM, extras.OPTIMIZER):
            return SimpleNamespace(name=name) if name in modules else None
        return real(name, package)

    def metadata(name: str) -> Any:
        if summary is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return {"Version": "0.9", "Summary": summary}

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib.metadata, "metadata", metadata)


def test_without_apex_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (), None)
    assert extras.find_apex() is None


def test_the_package_of_that_name_on_the_index_is_named_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ("apex",), "Pyramid toolkit to add Velruse, Flash Messages, CSRF, ReCaptcha and Sessions")
    found = extras.find_apex()
    assert found is not None and not found.extensions
    assert "unrelated package" in found.why_not and "Pyramid" in found.why_not


def test_apex_without_its_extensions_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ("apex",), "PyTorch Extensions written by NVIDIA")
    found = extras.find_apex()
    assert found is not None and not found.extensions and "APEX_CUDA_EXT=1" in found.why_not


def test_apex_counts_with_an_extension_and_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ("apex", extras.NORM), None)
    assert extras.uses_apex(extras.NORM, torch.device("cuda"))
    assert not extras.uses_apex(extras.OPTIMIZER, torch.device("cuda"))
    assert not extras.uses_apex(extras.NORM, torch.device("cpu"))


def apex_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module of apex with the interface of the real one, in torch, used on the CPU as if it were a GPU."""
    module = ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, name.rpartition(".")[0], ModuleType(name.rpartition(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(extras, "uses_apex", lambda extension, device: True)


def test_norms_are_the_same_with_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fused(x: Tensor, weight: Tensor, shape: torch.Size, eps: float) -> Tensor:
        calls.append(shape)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    torch.manual_seed(0)
    norm, x = RMSNorm(8), torch.randn(3, 8)
    nn.init.normal_(norm.weight)
    own = norm(x)
    apex_in(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused)
    torch.testing.assert_close(norm(x), own)
    assert calls == [(8,)]


def test_optimizers_take_the_same_steps_with_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params: Any, adam_w_mode: bool, **options: Any) -> None:
            assert adam_w_mode
            super().__init__(params, **options)

    def trained() -> tuple[Tensor, str]:
        weight = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = extras.adamw([weight], 0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(5):
            weight.grad = torch.cos(weight.detach() + step)
            optimizer.step()
        return weight.detach(), type(optimizer).__name__

    own, name = trained()
    apex_in(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    fused, fused_name = trained()
    assert (name, fused_name) == ("AdamW", "FusedAdam")
    torch.testing.assert_close(own, fused)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="adamw got no parameters"):
        extras.adamw([], 0.1)
