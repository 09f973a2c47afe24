"""Orthogonal rotations that spread energy evenly over the channels of a latent, folded into its factors offline."""

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
