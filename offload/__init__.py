"""Which activations stay, leave or are computed again, token by token, and where in memory each buffer lies.

    profile = profile_of(decoder("llama-8b"), tokens=2**17, devices=8, gpu=gpu("h100"))
    plan = plan_swap(profile, machine_of(gpu("h100")))          # shares of tokens for each saved tensor
    with activations(model, plan, tier=FileTier(folder)):       # what the layers save leaves, and comes back
        loss = model(batch)
    placement = place(trace(build).of_kind("transient"))        # addresses, with a lower bound beside the peak

A ``Trace`` lists every buffer of a step without its memory; a ``SwapPlan`` and a ``Placement`` are checked by code that
shares nothing with what made them. Nothing here needs a GPU. Papers: MEMO (arXiv 2407.12117) for swapping by token and
for the bi-level programme; MiniMalloc (ASPLOS 2023) for the exact search.
"""

from offload.activations import Activations as Activations
from offload.activations import activations as activations
from offload.arena import Arena as Arena
from offload.buffers import Buffer as Buffer
from offload.buffers import Placement as Placement
from offload.check_placement import check_placement as check_placement
from offload.decoders import decoder as decoder
from offload.decoders import gpu as gpu
from offload.decoders import machine_of as machine_of
from offload.decoders import profile_of as profile_of
from offload.file_tier import FileTier as FileTier
from offload.place import place as place
from offload.profile import LayerProfile as LayerProfile
from offload.profile import Machine as Machine
from offload.profile import SavedTensor as SavedTensor
from offload.strategies import Fractions as Fractions
from offload.swap_check import check_swap_plan as check_swap_plan
from offload.swap_plan import SwapPlan as SwapPlan
from offload.swap_plan import compare as compare
from offload.swap_plan import plan_swap as plan_swap
from offload.tiers import HostTier as HostTier
from offload.trace import Trace as Trace
from offload.trace import allocator_trace as allocator_trace
from offload.trace import trace as trace
