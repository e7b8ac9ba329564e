"""What each of two processes does that share one GPU: `torchrun --nproc-per-node 2 -m tests.gpu.two`."""

import torch

from seqpar import Shard
from seqpar.collectives import connect, disconnect
from tests.gpu.here import DEVICE
from tests.gpu.test_cut import LENGTHS, OPS, mine, whole
from tests.gpu.through_host import ThroughHost


def main() -> None:
    group = ThroughHost(connect("gloo", timeout_seconds=60))
    for name in OPS:
        found, shard = mine(name, group, "zigzag", torch.float32, DEVICE), Shard.of(LENGTHS, group, "zigzag")
        for part, exact in zip(found, whole(name)):
            error = float((part.double() - shard.take(exact)).norm() / exact.norm().clamp(min=1e-30))
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
        print(f"rank {group.rank}: {name} on {group.size} ranks and on one agree", flush=True)
    disconnect()


if __name__ == "__main__":
    main()
