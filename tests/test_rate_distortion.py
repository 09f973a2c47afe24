"""The rate-distortion bound of what shares a latent."""

import math
import random
import string

import pytest
import torch

from scripts.rate_distortion import (
    BITS,
    SHAPES,
    RateConfig,
    divergences,
    estimates,
    estimates_table,
    main,
    rate,
    rate_table,
)
from tests.helpers import save_byte_tokenizer, tiny_dense

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_rate_is_that_of_reverse_water_filling():
    bits, channels = rate(torch.full((10,), 4.0).double(), 0.25)
    assert channels == 10 and bits == pytest.approx(10 * 0.5 * math.log2(4), rel=1e-6)
    # Channels below the water level get no bits: a level of 0.6 leaves 0.6 + 0.5 + 0.1 of 8.6.
    bits, channels = rate(torch.tensor([8.0, 0.5, 0.1]).double(), 1.2 / 8.6)
    assert channels == 1 and bits == pytest.approx(0.5 * math.log2(8 / 0.6), rel=1e-6)


def test_what_sharing_is_worth(tmp_path):
    model = {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_dense(**model, intermediate_size=48, head_dim=8, vocab_size=300, bos_token_id=0).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices(string.printable[:94], k=6 * 390)))
    how = {"windows": 4, "length": 388, "statistics": str(tmp_path / "statistics"), "text": str(text)}
    record = main(RateConfig(model=str(tmp_path), **how))
    assert list(record["results"]) == list(SHAPES)
    bits = {name: found["bits"]["0.01"] for name, found in record["results"].items()}
    # What shares a latent needs fewer bits, the more of it the fewer.
    assert 0 < bits["3 layers, k + v"] < bits["2 layers, k + v"] < bits["k + v"] < bits["separate"]
    assert bits["separate"] < bits["per head: separate"]
    assert f"{bits['k + v']:.2f}" in rate_table(record)
    # What is estimated from less text costs more on other text; a table says by how much.
    found = record["estimates"]
    (first, shares), *_ = found.items()
    assert shares == [1.0] * len(BITS)
    assert min(found["half of the windows"]) > 1
    assert f"| {first} | +0.0% |" in estimates_table(record)


def test_the_divergence_of_directions():
    """Directions of the text itself cost least, and what they cost is what reverse water-filling says."""
    generator = torch.Generator().manual_seed(0)
    states, gradients = (torch.randn(2, 400, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    states[..., 6:] = states[..., :6] + 0.1 * states[..., 6:]
    states *= torch.linspace(0.2, 2, 12, dtype=torch.float64)
    by_name = estimates(states, gradients, torch.eye(12, dtype=torch.float64), 6, 3)
    covariance, metric = next(iter(by_name.values()))
    assert torch.equal(metric[:6, 6:], torch.zeros(6, 6, dtype=torch.float64))
    best = divergences(covariance, metric, covariance, metric)
    # All of it: the energies are those of the metric's root, and the bits are the rate of that distortion.
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.sqrt()) @ vectors.T
    energy = torch.linalg.eigvalsh(root @ covariance @ root)
    for bits, nats in zip(BITS, best, strict=True):
        assert rate(energy, nats / energy.sum().item())[0] / 12 == pytest.approx(bits, rel=1e-6)
    for name, other in by_name.items():
        assert min(divergences(*other, covariance, metric)) >= min(best) * (1 - 1e-9), name
