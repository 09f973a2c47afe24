"""The expansion fitted to what a cache gives back, and the divergence that is left, by gradients of single tokens.

A quantizer of least squared error shrinks: what it gives back is nearer to the mean than what it was given, and a
channel that is dropped is the mean. For a key, shrinking is no error like others: tokens are attended to because their
keys lie along the queries, so that the gradient and the error point the same way. On SmolLM2 at an eighth of the bytes
errors of keys cost 2.5 times what errors independent of the gradients would. The columns of `A` are therefore
multiplied by a factor for each width, of least cost over sampled tokens and their gradients. This takes no byte and no
time.
"""

from dataclasses import replace

import torch

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import make_codec
from modules.fit.allocation import backend_of
from modules.svd_linear import Factors

#: Consecutive tokens whose errors are taken together in the prediction.
_RUN = 64


def restored_latents(
    factors: Factors,
    sample: torch.Tensor,
    scheme: QuantScheme,
    tiers: list[tuple[int, float]],
    scales: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Latents `[N, r]` float32 as a cache with calibrated scales gives them back.

    Args:
        factors: Of one head group, with the r channels that are kept.
        sample: `[windows, S, out]` outputs, N = windows * S.
        scheme: Of the side.
        tiers: (channels, bits) of each tier.
        scales: Scale and zero point `[r]`.
    """
    latents = (sample.flatten(0, 1).double() @ factors.project.T).float()
    scheme = replace(scheme, tiers=(tuple(tiers),))
    widths, backend = (latents.shape[1],), backend_of(scheme)
    codec = make_codec(scheme, len(latents), widths, torch.float32, backend, static_scales=scales)
    return codec.decode(codec.encode(latents[None]))[0]


def expansion_gains(
    a: torch.Tensor, restored: torch.Tensor, outputs: torch.Tensor, gradient: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """Factors `[r]` on the columns of A that minimise `E[(g · (A diag(f) ẑ - y))²]`, one for each tier.

    A factor for each channel would fit the noise of the gradients: on SmolLM2's blocks it lost on other texts what it
    gained on the sample.

    Args:
        a: `[out, r]` columns of one member.
        restored: `[N, r]`, ẑ.
        outputs, gradient: `[N, out]`, y and g of the same tokens.
        counts: Channels of each tier, r together.
    """
    # What each tier adds to the change of the loss, and what is missing with factors of one.
    features = torch.stack([piece.sum(1) for piece in ((gradient @ a) * restored).split(counts, dim=1)], dim=1).double()
    missing = (gradient * outputs).sum(1).double() - features.sum(1)
    gram = features.T @ features
    # Of a member without gradients nothing is known.
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp(min=1e-30))
    gains = 1 + torch.linalg.solve(gram, features.T @ missing)
    return gains.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=gains.device))


def predicted_divergence(changes: torch.Tensor) -> float:
    """KL divergence per token, to second order, from what the errors of sampled tokens do to the loss.

    Errors of neighbouring tokens, layers and sides are not independent: what they do is summed up over runs of
    consecutive tokens before it is squared.

    Args:
        changes: `[windows, S]`, `Σ g · δ` of each token over all projections, errors δ and gradients g.
    """
    run = min(_RUN, changes.shape[1])
    runs = changes[:, : changes.shape[1] // run * run].double().unflatten(1, (-1, run)).sum(2)
    return (runs.square().mean() / (2 * run)).item()
