"""Orthogonal rotations that spread energy evenly over channels.

The rotation of a latent is folded into its factors offline (`fuse_rotation`); states that come without factors are
rotated by `rotate` and `rotate_back`.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.linalg import hadamard


def hartley(n: int) -> np.ndarray:
    """Orthonormal, symmetric `[n, n]` Hartley matrix `cas(2πij/n)/√n`: real, dense, for any n."""
    angle = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(n)


def hadamard_matrix(n: int, seed: int = 0) -> torch.Tensor:
    """Random orthogonal `[n, n]` float64 rotation whose entries are all of the order of `1/√n`.

    The Kronecker product of the Hadamard matrix of n's largest power of two (Sylvester) with the Hartley matrix of
    n's odd part, its columns multiplied by random signs (QuIP#, arXiv:2402.04396, section 3, for the signs).
    """
    power_of_two = n & -n
    odd = n // power_of_two
    signs = np.random.default_rng([seed, n]).choice([-1.0, 1.0], size=n)
    rotation = np.kron(hadamard(power_of_two) / np.sqrt(power_of_two), hartley(odd))
    return torch.from_numpy(rotation * signs)


def fuse_rotation(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the latent of `A @ B` by H: returns `(A Hᵀ, H B)`, whose product is unchanged.

    Args:
        a: `[out, r]`; b: `[r, in]`, both float64.
    """
    rotation = hadamard_matrix(b.shape[0]).to(b)
    return a @ rotation.T, rotation @ b


def _transform(x: torch.Tensor) -> torch.Tensor:
    """The Kronecker product of `hadamard_matrix`, without its signs, applied to `[..., n]`; its own inverse.

    Only element-wise operations, so that a row's result does not depend on how many rows there are.
    """
    n = x.shape[-1]
    power_of_two = n & -n
    odd = n // power_of_two
    # Hadamard: log2 rounds of sums and differences of pairs whose distance doubles.
    half = 1
    while half < power_of_two:
        pairs = x.unflatten(-1, (-1, 2, half * odd))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).flatten(-3)
        half *= 2
    # Hartley, of the odd part: a sum of columns, not a matrix product.
    if odd > 1:
        matrix = torch.from_numpy(hartley(odd)).to(x)
        columns = x.unflatten(-1, (power_of_two, odd))
        x = sum(columns[..., j : j + 1] * matrix[j] for j in range(odd)).flatten(-2)
    return x * power_of_two**-0.5


@lru_cache
@torch.inference_mode(False)
def _signs(n: int, device: torch.device) -> torch.Tensor:
    """The signs of `hadamard_matrix(n)`, `[n]` float32."""
    return torch.from_numpy(np.random.default_rng([0, n]).choice([-1.0, 1.0], size=n)).float().to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`x @ hadamard_matrix(n).T` of float32 `[..., n]`."""
    return _transform(x * _signs(x.shape[-1], x.device))


def rotate_back(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `rotate`."""
    return _transform(x) * _signs(x.shape[-1], x.device)
