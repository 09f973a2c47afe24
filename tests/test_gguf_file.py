"""Models in GGUF files: small ones written here as llama.cpp writes them, and read by the scripts."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType, GGUFWriter
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from scripts import gguf_file
from scripts.calibrate_svd_ranks import CalibrationConfig
from scripts.calibrate_svd_ranks import main as calibrate
from scripts.common import find_model, latent_config, load_model
from scripts.gguf_file import converted_folder
from tests.helpers import TINY_LLAMA, randomize_vectors, save_byte_tokenizer, tiny_dense

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"

#: Names of a layer's weights in the file and in the model.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(autouse=True)
def converted_here(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CONVERTED", tmp_path / "converted")


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of llama.cpp: the two halves that RoPE turns together stand side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, model: PreTrainedModel, fields: dict | None = None, **tensors: torch.Tensor) -> Path:
    """A file as `convert_hf_to_gguf.py` of llama.cpp writes it, in float32, with the byte tokenizer of the tests."""
    config, architecture = model.config, model.config.model_type
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (fields or {}).items():
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
    add_tokenizer(writer, path.parent)
    for name, tensor in (file_tensors(model) | tensors).items():
        writer.add_tensor(name.replace("__", "."), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    """The 257 tokens of `save_byte_tokenizer` and two merged of them; the second one ends a text."""
    save_byte_tokenizer(folder / "bytes")
    tokens = AutoTokenizer.from_pretrained(folder / "bytes").convert_ids_to_tokens(range(257))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, "ab", "abc"])
    writer.add_token_types([3, *[1] * 258])  # control, normal
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)


def file_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights by their names in a file."""
    config, weights = model.config, model.state_dict()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        for short, long in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights.get(f"model.layers.{i}.{long}.{kind}")
                if tensor is None:
                    continue
                if config.model_type == "llama" and short in heads:
                    tensor = interleaved(tensor, heads[short])
                found[f"blk.{i}.{short}.{kind}"] = tensor
    return found


def tiny_llama(**overrides) -> PreTrainedModel:
    return rounded(tiny_dense(vocab_size=259, hidden_size=128, **overrides))


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights in bfloat16, but for the frequencies of RoPE, as when it is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16()
    return model.eval()


def tiny_qwen2() -> PreTrainedModel:
    fields = TINY_LLAMA | {"vocab_size": 259, "hidden_size": 128}
    model = Qwen2ForCausalLM(Qwen2Config(**fields))
    randomize_vectors(model)
    return rounded(model)


def tiny_qwen3() -> PreTrainedModel:
    # Transformers takes heads of 128, as every Qwen3 has, whatever the file says.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    model = Qwen3ForCausalLM(Qwen3Config(**TINY_LLAMA | {"vocab_size": 259, "hidden_size": 128} | heads))
    randomize_vectors(model)
    return rounded(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_the_model_of_a_file_is_the_model_that_was_written(tmp_path, make):
    model = make()
    found, _ = load_model(str(write_gguf(tmp_path / "a.gguf", model)))
    assert found.config.model_type == model.config.model_type
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], tensor), name
    ids = torch.randint(259, (2, 40))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_the_tokenizer_of_a_file(tmp_path):
    _, tokenizer = load_model(str(write_gguf(tmp_path / "a.gguf", tiny_llama())))
    text = "def f(x):\n    return 'π', 12345 . ,  x\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer("ababc").input_ids == [257, 258]
    assert len(tokenizer) == 259
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user: Hi"


def test_a_file_is_converted_once(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama())
    folder = find_model(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "convert", None)
        copy = tmp_path / "elsewhere" / "a.gguf"
        copy.parent.mkdir()
        copy.write_bytes(file.read_bytes())
        assert find_model(str(file)) == find_model(str(copy)) == folder
    # Another model under the same name is another folder, and nothing half done is left.
    other = find_model(str(write_gguf(file, tiny_llama(seed=1))))
    assert other != folder
    assert sorted(p.name for p in (tmp_path / "converted").iterdir()) == sorted(Path(p).name for p in (folder, other))


def test_an_interrupted_conversion_leaves_no_folder(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama())

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            converted_folder(file)
    assert not any((tmp_path / "converted").iterdir())
    assert (converted_folder(file) / "config.json").is_file()


def test_a_file_is_split_and_calibrated_like_a_folder(tmp_path):
    file = str(write_gguf(tmp_path / "a.gguf", tiny_llama()))
    config, is_split = latent_config(file, 0.5)
    assert not is_split
    assert type(load_model(file, config=config)[0].model.layers[0].self_attn.k_proj).__name__ == "SVDLinear"
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 100)
    where = {"output": str(tmp_path / "split"), "statistics": str(tmp_path / "statistics"), "text": str(text)}
    calibrate(CalibrationConfig(model=file, budget=0.125, windows=4, length=256, **where))
    assert ALRDLlamaConfig.from_pretrained(tmp_path / "split").truncation_ranks


# Errors


def check_refused(file: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_model(str(file))


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    check_refused(file, r"model='.*model\.gguf': must be a GGUF file or a checkpoint folder")
    file.write_bytes(b"")
    check_refused(file, r"model='.*model\.gguf': must be a GGUF file or a checkpoint folder")


@pytest.mark.parametrize("name", ["no.gguf", "models/no.gguf", "./no.gguf"])
def test_a_missing_file_is_named(name):
    check_refused(Path(name), r"model='.*no\.gguf': must be an existing folder, a GGUF file, or a hub name")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5])
def test_half_a_file_is_refused(tmp_path, share):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    check_refused(file, r"model='.*a\.gguf': must be a whole GGUF file")


def test_another_version_is_refused(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    check_refused(file, r"model='.*a\.gguf': must be a whole GGUF file \(.*1")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma2", "soft-capped"),
        ("phi3", "'qwen3' in a GGUF file"),
        ("mamba", "state-space"),
        ("clip", "does not know"),
    ],
)
def test_another_architecture_is_refused(tmp_path, architecture, reason):
    writer = GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check_refused(tmp_path / "a.gguf", rf"model='.*a\.gguf': general\.architecture='{architecture}'.*{reason}")


def test_experts_are_refused(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(), {"llama.expert_count": 8})
    check_refused(file, r"general\.architecture='mixtral': must be one of .* in a GGUF file")


def test_one_part_of_several_is_refused(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(), {"split.count": 3})
    check_refused(file, r"split\.count=3: must be 1; join the files by `llama-gguf-split --merge`")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"model='.*a\.gguf': .*the package gguf: pip install gguf"):
        find_model(str(file))


# RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_divisors(model: PreTrainedModel) -> torch.Tensor:
    """What the frequencies of a model are divided by."""
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]})
    return plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq


def test_the_scaling_of_llama_3_1_is_read(tmp_path):
    model = tiny_llama(rope_parameters=LLAMA3, max_position_embeddings=131072)
    divisors = rope_divisors(model)
    assert divisors.min() == 1 and divisors.max() == 8
    found, _ = load_model(str(write_gguf(tmp_path / "a.gguf", model, rope_freqs__weight=divisors)))
    assert found.config.rope_parameters == LLAMA3
    assert torch.allclose(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = torch.randint(259, (1, 90))
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-2)


def test_other_factors_are_refused(tmp_path):
    model = tiny_llama(rope_parameters=LLAMA3)
    divisors = rope_divisors(model)
    for wrong in (divisors.flip(0), divisors[1:], torch.full_like(divisors, 8.0)):
        file = write_gguf(tmp_path / "a.gguf", model, rope_freqs__weight=wrong)
        check_refused(file, r"rope_freqs\.weight: must be the factors of Llama 3\.1")


def test_another_scaling_is_refused(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(), {"llama.rope.scaling.type": "yarn"})
    check_refused(file, r"rope\.scaling\.type='yarn': must be 'none'; take the original checkpoint")
    file = write_gguf(tmp_path / "b.gguf", tiny_llama(), {"llama.rope.scaling.type": "none"})
    assert find_model(str(file))
