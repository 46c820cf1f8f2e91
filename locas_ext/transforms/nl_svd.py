"""NL-SVD: a two-layer memory of many slots as one of few (docs/method.md, "NL-SVD"). One layer, plain torch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from locas_ext.checks import integer, number
from locas_ext.ops.activations import activate, activation_function, activation_index, has_parameters

# The largest |act'| of each activation, rounded up. Those of relu2 and xIELU have no bound.
_LIPSCHITZ = {
    "silu": 1.0999,
    "gelu_pytorch_tanh": 1.1290,
    "gelu": 1.1290,
    "relu": 1.0,
    "relu2": math.inf,
    "quick_gelu": 1.0999,
}


class Compressed(NamedTuple):
    """The slots that stand for a larger memory, in its dtype and on its device, and what they leave out.

    Energy is the sum over slots of (||K_i|| ||V_i||)^2; kept and discarded together are the original memory's.
    """

    key: Tensor  # [n, d]: the probes, orthonormal rows, most energy first; n <= rank
    value: Tensor  # [n, d]: f(probe) / act(1)
    kept_energy: float
    discarded_energy: float
    error_bound: float  # of ||f(x) - f(Px)|| / ||x - Px||, P projects onto the probes' span; infinite for relu2 and xIELU


@torch.no_grad()
def nl_svd(key: Tensor, value: Tensor, rank: int, activation: str = "relu", threshold: float = 0.0) -> Compressed:
    """Compresses f(x) = act(x key^T) value to at most `rank` slots that agree with f on as many orthonormal probes.

    key, value: [m, d], both float32 or both float64. The probes are the leading eigenvectors of the energy matrix, each
    with the sign for which f is longer. Those whose weighted norm (the root of the eigenvalue) is under `threshold`, or
    no more than rounding, are left out. So there may be fewer than `rank`, and none if no slot has a key and a value.

    Raises ValueError for key and value of other shapes or dtypes (half precision has to be converted first), empty or
    with numbers that are not finite; for a rank outside 1 .. min(m, d), a threshold that is negative or not finite and
    an unknown activation; TypeError for a rank that is not an integer.
    """
    activation_index(activation)
    lipschitz = math.inf if has_parameters(activation) else _LIPSCHITZ[activation_function(activation)]
    _check(key, value, rank, threshold)
    # Always float64: eigenvalues are squares; float32 loses norms under 1/500 of the largest (bench/nl_svd.py).
    keys, values = key.double(), value.double()
    lengths = values.norm(dim=1, keepdim=True)
    eigenvalues, eigenvectors = _energy_spectrum(lengths * keys)
    spectrum = eigenvalues.cpu()
    norms = spectrum.sqrt()
    # What rounding can make of a weighted norm of zero: that of the eigenvalues, or that of float32 input itself.
    precision = max(torch.finfo(key.dtype).eps, math.sqrt(torch.finfo(torch.float64).eps))
    noise = float(norms[0]) * math.sqrt(max(key.shape)) * precision
    n = int(((norms > noise) & (norms >= threshold))[:rank].sum())
    probes = eigenvectors[:n]
    hidden = probes @ keys.T
    along, against = (activate(h, activation) @ values for h in (hidden, -hidden))
    flip = against.norm(dim=1, keepdim=True) > along.norm(dim=1, keepdim=True)
    probes, outputs = torch.where(flip, -probes, probes), torch.where(flip, against, along)
    largest_discarded = float(norms[n]) if n < len(norms) else 0.0
    return Compressed(
        key=probes.to(key.dtype),
        value=(outputs / activate(outputs.new_ones(()), activation)).to(value.dtype),
        kept_energy=float(spectrum[:n].sum()),
        discarded_energy=float(spectrum[n:].sum()),
        error_bound=lipschitz * math.sqrt(_alignment(values, lengths)) * (largest_discarded + noise),
    )


def _energy_spectrum(weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [min(m, d)], largest first, and eigenvectors [min(m, d), d] of the energy matrix weighted^T weighted.

    Row i of weighted [m, d] is ||V_i|| K_i, so this is sum_i s_i^2 k_i^T k_i with unit keys k_i, s_i = ||K_i|| ||V_i||,
    and a zero key or value needs no case of its own.
    """
    m, d = weighted.shape
    if m >= d:
        eigenvalues, vectors = torch.linalg.eigh(weighted.T @ weighted)
        vectors = vectors.T
    else:  # an orthonormal basis of the keys' span first: the small problem's eigenvectors then need no division
        basis, factor = torch.linalg.qr(weighted.T)
        eigenvalues, vectors = torch.linalg.eigh(factor @ factor.T)
        vectors = vectors.T @ basis.T
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(0)


def _alignment(values: Tensor, lengths: Tensor) -> Tensor:
    """The Frobenius norm of U^T U, U [m, d] the unit values: at least ||U||_2^2, at most m (all values alike)."""
    units = values / lengths.clamp_min(torch.finfo(values.dtype).tiny)
    m, d = units.shape
    return torch.linalg.matrix_norm(units.T @ units if m >= d else units @ units.T)


def _check(key: Tensor, value: Tensor, rank: int, threshold: float) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}; expected torch.float32 or torch.float64: convert it before compressing"
            )
        if tensor.dim() != 2 or tensor.numel() == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [m, d] with m and d at least 1")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")
    for what in ("shape", "dtype", "device"):
        if getattr(key, what) != getattr(value, what):
            raise ValueError(f"value has {what} {getattr(value, what)}; expected that of key, {getattr(key, what)}")
    m, d = key.shape
    integer("rank", rank, 1, min(m, d), f"the {m} slots there are, and the hidden size {d}")
    number("threshold", threshold, 0)
