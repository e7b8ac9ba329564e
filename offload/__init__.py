"""Which activations stay, leave or are computed again, token by token, and where in memory each buffer lies.

    profile = profile_of(decoder("llama-8b"), tokens=2**17, devices=8, gpu=gpu("H100-80G"))
    plan = plan_swap(profile, machine_of(gpu("H100-80G")))      # shares of tokens for each saved tensor
    with activations(model, plan, tier=FileTier(folder)):       # what the layers save leaves, and comes back
        loss = model(batch)
    placement = place(trace(build).of_kind("transient"))        # addresses, with a lower bound beside the peak

A ``Trace`` lists every buffer of a step without its memory; a ``SwapPlan`` and a ``Placement`` are checked by code that
shares nothing with what made them. Nothing here needs a GPU. Papers: MEMO (arXiv 2407.12117) for swapping by token and
for the bi-level programme; MiniMalloc (ASPLOS 2023) for the exact search.
"""

if __name__ != "seqpar.offload":
    raise ImportError("import it as seqpar.offload: under two names there would be two of everything in it")

from seqpar.offload.placement.arena import Arena as Arena
from seqpar.offload.placement.buffers import Buffer as Buffer
from seqpar.offload.placement.buffers import Placement as Placement
from seqpar.offload.placement.check_placement import check_placement as check_placement
from seqpar.offload.placement.place import place as place
from seqpar.offload.planning.decoders import decoder as decoder
from seqpar.offload.planning.decoders import gpu as gpu
from seqpar.offload.planning.decoders import machine_of as machine_of
from seqpar.offload.planning.decoders import profile_of as profile_of
from seqpar.offload.planning.plan import SwapPlan as SwapPlan
from seqpar.offload.planning.profile import LayerProfile as LayerProfile
from seqpar.offload.planning.profile import Machine as Machine
from seqpar.offload.planning.profile import SavedTensor as SavedTensor
from seqpar.offload.planning.strategies import Fractions as Fractions
from seqpar.offload.planning.swap_check import check_swap_plan as check_swap_plan
from seqpar.offload.planning.swap_plan import compare as compare
from seqpar.offload.planning.swap_plan import plan_swap as plan_swap
from seqpar.offload.runtime.activations import Activations as Activations
from seqpar.offload.runtime.activations import activations as activations
from seqpar.offload.runtime.file_tier import FileTier as FileTier
from seqpar.offload.runtime.tiers import HostTier as HostTier
from seqpar.offload.trace import Trace as Trace
from seqpar.offload.trace import allocator_trace as allocator_trace
from seqpar.offload.trace import trace as trace
