"""When a kernel of ours counts as computing what the host's own code computes."""

from torch import Tensor

from locas_ext.hosts.probe.agreement import rounding


def distance(ours: Tensor, own: Tensor) -> float:
    """How far ours is from the host's own, as a part of its length; NaN where one of them is not finite."""
    own, ours = own.float(), ours.float()
    return ((ours - own).norm() / own.norm().clamp_min(1e-30)).item()


def agree(ours: Tensor, own: Tensor) -> bool:
    """Whether they differ by no more than other orders of a few roundings may make."""
    if ours.shape != own.shape or ours.dtype != own.dtype:
        return False
    eps = rounding(own)
    return distance(ours, own) <= (4 if eps > 1e-4 else 64) * eps
