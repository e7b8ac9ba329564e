"""The learning rate over a run: torch's own schedulers, put together."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def cosine(optimizer: Optimizer, steps: int, warm_up: int = 0, least: float = 0.1) -> LRScheduler:
    """Rise evenly over the first ``warm_up`` steps to the optimizer's rate, then fall along half a cosine.

    Step ``steps`` would have ``least`` times the rate. Raises ``ValueError`` unless ``0 <= warm_up < steps``.
    """
    if not 0 <= warm_up < steps or not 0 <= least <= 1:
        raise ValueError(f"expected 0 <= warm_up < steps and 0 <= least <= 1, got {warm_up} of {steps} steps, {least}")
    rate = max(group["lr"] for group in optimizer.param_groups)
    if not warm_up:
        return CosineAnnealingLR(optimizer, steps, eta_min=least * rate)
    rise = LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    fall = CosineAnnealingLR(optimizer, steps - warm_up, eta_min=least * rate)
    return SequentialLR(optimizer, [rise, fall], milestones=[warm_up])
