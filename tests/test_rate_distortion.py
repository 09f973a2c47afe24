"""The rate-distortion bound of what shares a latent."""

import math
import random
import string

import pytest
import torch

from scripts.rate_distortion import SHAPES, RateConfig, main, rate, rate_table
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
