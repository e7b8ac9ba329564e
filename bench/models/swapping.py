"""Memory and time of a training step with activations kept, swapped or recomputed: `python -m bench.models.swapping`.

Each variant trains in a process of its own. Its peak is the high-water mark of the resident memory (VmHWM) above what
the process had after a step of a few tokens, so above parameters, gradients and libraries. The allocator is told to
give memory back at once (MALLOC_...), or its leftovers would count as well. The predicted peak comes from two short
steps whose live bytes are counted storage by storage: everything grows in proportion to the tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar import Cut, next_token_loss
from seqpar.models import HybridLM
from seqpar.models.hybrid import HybridConfig
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.activations import activations
from seqpar.offload.runtime.file_tier import FileTier
from seqpar.offload.runtime.tiers import HostTier
from seqpar.training.swapped import swapped_cut

KEEP = "keep"
VARIANTS = {
    KEEP: None,
    "file": Fractions(0.0, 1.0, 0.0),
    "file, a quarter computed again": Fractions(0.0, 0.75, 0.25),
    "host": Fractions(0.0, 1.0, 0.0),
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
MEBIBYTE = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, bytes_ = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += bytes_
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, bytes_)

    def _gone(self, key, bytes_):
        self._seen.discard(key)
        self.now -= bytes_


def build(arguments):
    torch.manual_seed(0)
    return HybridLM(HybridConfig(dim=arguments.dim, layers=arguments.layers))


def step(model, tokens, swap):
    """The loss of one step; gradients are accumulated."""
    cut = Cut.whole([tokens.shape[1]])
    with swap or nullcontext():
        logits = model(tokens, swapped_cut(cut, swap) if swap else cut)
    loss = next_token_loss(logits, tokens, shard=cut.shard, group=cut.group)
    del logits
    loss.backward()
    return loss.item()


def prepared(arguments, folder):
    model, fate = build(arguments), VARIANTS[arguments.variant]
    if fate is None:
        return model, None
    tier = HostTier() if arguments.variant == "host" else FileTier(folder)
    return model, activations(model, fate, tier=tier, keep_last=0)


def batch(tokens):
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))


def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measured(arguments, folder):
    """Peaks and seconds of each step, and what the gradients sum up to."""
    model, swap = prepared(arguments, folder)
    step(model, batch(512), swap)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad.zero_()
    before, rows = memory("VmRSS"), []
    for _ in range(arguments.steps):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        begin = time.perf_counter()
        loss = step(model, batch(arguments.tokens), swap)
        seconds = time.perf_counter() - begin
        rows.append({"loss": loss, "seconds": seconds, "peak_bytes": memory("VmHWM") - before})
    digest = [parameter.grad.double().norm().item() for parameter in model.parameters()]
    stored = 0 if swap is None else swap.machinery.tier.size
    return {"steps": rows, "tier_bytes": stored, "gradient_norms": digest}


def predicted(arguments, folder):
    """The peak of live bytes at the full length, from two short steps."""
    points = []
    for tokens in (arguments.tokens // 16, arguments.tokens // 8):
        model, swap = prepared(arguments, folder)
        step(model, batch(512), swap)
        with LiveBytes() as live:
            step(model, batch(tokens), swap)
        stored = swap.machinery.tier.size if arguments.variant == "host" else 0  # on a CPU that is the same memory
        points.append((tokens, live.peak + stored))
    (short, low), (long, high) = points
    return {"peak_bytes": round(low + (high - low) / (long - short) * (arguments.tokens - short))}


def run(arguments, variant, what):
    command = [sys.executable, "-m", "bench.models.swapping", "--variant", variant, "--what", what]
    for name in ("tokens", "dim", "layers", "steps", "folder"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compared(arguments):
    """Every variant against keeping all."""
    found = {}
    for variant in arguments.only or VARIANTS:
        found[variant] = run(arguments, variant, "measured")
        found[variant]["predicted_peak_bytes"] = run(arguments, variant, "predicted")["peak_bytes"]
        print(summary(variant, found[variant], found[KEEP]), file=sys.stderr)
    return {variant: row | ratios(row, found[KEEP]) for variant, row in found.items()}


def peak(row):
    return max(step["peak_bytes"] for step in row["steps"])


def seconds(row):
    return statistics.median(step["seconds"] for step in row["steps"])


def ratios(row, keep):
    norms = row.pop("gradient_norms") if row is not keep else row["gradient_norms"]
    return {
        "peak_over_keep": peak(row) / peak(keep),
        "seconds_over_keep": seconds(row) / seconds(keep),
        "predicted_over_measured": row["predicted_peak_bytes"] / peak(row),
        "same_loss_and_gradient_norms": norms == keep["gradient_norms"]
        and [s["loss"] for s in row["steps"]] == [s["loss"] for s in keep["steps"]],
    }


def summary(variant, row, keep):
    return (
        f"{variant}: peak {peak(row) / MEBIBYTE:.0f} MiB ({peak(row) / peak(keep):.2f} of keep), predicted "
        f"{row['predicted_peak_bytes'] / MEBIBYTE:.0f} MiB, {seconds(row):.1f} s ({seconds(row) / seconds(keep):.2f})"
    )


def options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--out")
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--what", choices=["measured", "predicted"])
    return parser.parse_args(arguments)


def main(words):
    arguments = options(words)
    torch.set_num_threads(1)
    if arguments.variant:
        what = measured if arguments.what == "measured" else predicted
        print(json.dumps(what(arguments, arguments.folder)))
        return 0
    rows = compared(arguments)
    for row in rows.values():
        row.pop("gradient_norms", None)
    result = {
        "command": f"python -m bench.models.swapping --tokens {arguments.tokens} --out bench/results/swapping.json",
        "environment": ALLOCATOR,
        "model": {"dim": arguments.dim, "layers": arguments.layers, "tokens": arguments.tokens},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "variants": rows,
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
