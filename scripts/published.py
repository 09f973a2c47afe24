"""What published methods reach on models of 7 to 14 billion parameters, copied by hand from where it is stated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure of other people.

    Attributes:
        share: Bytes of the cache over those of the dense one in 16 bits, scales and all else counted.
        method: Its name.
        model: The model that it was tried on.
        figure: What was measured, of the dense cache and of theirs; perplexities are of WikiText-2.
        source: Where it is stated.
    """

    share: float
    method: str
    model: str
    figure: str
    source: str


_LLAMA, _LONGCHAT = "Llama-3.1-8B", "longchat-7B"
_PHASOR = "its authors; fake quantization, no kernel"

#: Sizes stated in bits per element are divided by the 16 of the dense cache.
PUBLISHED = (
    Published(1 / 3.3, "KVarN, keys 4 and values 2 bits", "14B", "throughput in vLLM +9%", "arXiv 2606.03458"),
    Published(0.20, "PhasorKV", _LLAMA, "perplexity 6.42 → 6.62", _PHASOR),
    Published(0.15, "PhasorKV", _LLAMA, "perplexity 6.42 → 7.04", _PHASOR),
    Published(0.10, "PhasorKV", _LLAMA, "perplexity 6.42 → 8.01", _PHASOR),
    Published(0.075, "PhasorKV", _LLAMA, "perplexity 6.42 → 9.81", _PHASOR),
    Published(0.15, "PhasorKV", _LONGCHAT, "perplexity 8.30 → 8.37", _PHASOR),
    Published(0.10, "PhasorKV", _LONGCHAT, "perplexity 8.30 → 8.77", _PHASOR),
    Published(0.19, "KIVI, 2 bits", _LLAMA, "perplexity 6.42 → 7.89", "authors of PhasorKV"),
    Published(2.28 / 16, "OSCAR", "Qwen3-8B", "five reasoning tasks 70.84 → 69.42", "arXiv 2605.17757, its repository"),
    Published(2.22 / 16, "NOVA-KV", _LLAMA, "RULER at 128k 84.2 → 63.3", "arXiv 2608.04074, a summary"),
    Published(2.22 / 16, "NOVA-KV", "Qwen3-8B", "RULER at 128k 83.4 → 75.4", "arXiv 2608.04074, a summary"),
    Published(1.25 / 16, "VecInfer", _LLAMA, "LongBench 53.7 → 50.3", "a summary"),
)
