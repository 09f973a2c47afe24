"""Everything below the model: quantization and packing, rotations, low-rank layers, the cache, attention over it."""

from modules.hadamard_utils import fuse_rotation, hadamard_matrix
from modules.kivi_cache import CacheScheme, KIVILatentCache, KIVIQuantizer, create_kivi_cache
from modules.quant_utils import (
    KIVIMixedQuantizer,
    kivi_quantize_per_channel,
    kivi_quantize_per_token,
    quantize_latent,
    quantize_latent_mixed,
)
from modules.svd_linear import ALinear, BLinear, SVDLinear

__all__ = [
    "ALinear",
    "BLinear",
    "CacheScheme",
    "KIVILatentCache",
    "KIVIMixedQuantizer",
    "KIVIQuantizer",
    "SVDLinear",
    "create_kivi_cache",
    "fuse_rotation",
    "hadamard_matrix",
    "kivi_quantize_per_channel",
    "kivi_quantize_per_token",
    "quantize_latent",
    "quantize_latent_mixed",
]
