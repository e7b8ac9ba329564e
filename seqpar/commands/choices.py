"""What the commands let one choose from, without importing torch; tests hold each list against the library's own."""

from collections.abc import Mapping
from types import MappingProxyType

LAYOUTS = ("contiguous", "zigzag", "striped")
TRANSPORTS = ("ring", "all_gather", "all_to_all")
SCANS = ("all_gather", "all_scan", "ring", "doubling")
MIXERS = ("linear_attention", "lightning_attention", "retention", "gla")

DECODERS = ("gpt-7b", "gpt-13b", "gpt-30b", "gpt-65b", "llama-1b", "llama-8b", "llama-70b")
PASSING_ON = ("hybrid-8b", "linear-8b")  # decoders with layers that pass a state on, which seqpar memory cannot plan
MEASURED = ("gpt-7b-192k", "gpt-7b-384k", "gpt-13b-192k", "gpt-13b-384k", "gpt-30b-192k", "gpt-30b-384k")
# GB/s of a device in its node, and Gbit/s of it to others.
GPUS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "A100-40G": (300, 200),
        "A100-80G": (300, 200),
        "A800-80G": (200, 200),
        "H100-80G": (450, 400),
        "H200-141G": (450, 400),
        "B200-180G": (900, 400),
    }
)
