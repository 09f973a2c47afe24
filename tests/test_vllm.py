"""Latent models in vLLM's engine; run by `make test-vllm` in a venv of its own.

Tokens are compared with those of our own `generate()` with a cache that packs every token as soon as its step is over,
and with the same pieces of the prompts. All in float32, greedy.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from configuration_alrd_llama import ARCHITECTURES, ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from scripts.corpus import load_documents
from tests.helpers import TINY_LLAMA, all_ranks, randomize_vectors, tiny_blocks, tiny_dense, tiny_split
from tests.test_architectures import dense_config, fitted, random_model

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "models" / "tiny-python-llama"

#: Tokens of a page, and new tokens of a request in a step.
PAGE, PIECE = 32, 64

#: Settings of the engine that all tests share; memory for 512 pages of the widest model here and more of the others.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": PAGE,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 4096,
    "long_prefill_token_threshold": PIECE,
    "long_prefill_token_threshold_adaptive": False,
    "enable_chunked_prefill": True,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": True,
}

#: Starts one engine after the other: jobs, settings and batches of prompts, come as lines of JSON, results go back as
#: such. vLLM is imported once, which takes as long as many a job.
RUNNER = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

def done(job):
    llm = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    batches = []
    for prompts in job["batches"]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        batches.append([[list(o.outputs[0].token_ids), o.num_cached_tokens] for o in outputs])
    return {"batches": batches, "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}

if __name__ == "__main__":
    answers = open(int(sys.argv[1]), "w")
    for line in sys.stdin:
        try:
            answer = done(json.loads(line))
        except Exception as error:
            answer = {"error": str(error)}
        gc.collect()
        cleanup_dist_env_and_memory()
        print(json.dumps(answer), file=answers, flush=True)
"""


class Engines:
    """A process that runs engines, in which they are started and go down again one by one."""

    def __init__(self, folder: Path, **variables):
        self.log, script = folder / "log", folder / "run.py"
        script.write_text(RUNNER)
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "0"}
        # What the engines print goes to a log; answers come through a pipe of their own.
        answers, to = os.pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(to)], env={**os.environ, **environment, **variables}, cwd=folder,
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[to], text=True,
            )  # fmt: skip
        os.close(to)
        self.answers = os.fdopen(answers)

    def run(self, job: dict) -> dict:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        assert answer, self.log.read_text()[-6000:]
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """In the process itself, so that an engine that goes down leaves no other behind."""
    engines = Engines(tmp_path_factory.mktemp("engines"), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    yield engines
    engines.close()


def run_engine(engines, model, batches, max_tokens: int = 16, fails: bool = False, **settings):
    """Tokens and cached tokens of each prompt of each batch, and the pages that there are; or what a failure says."""
    job = {"engine": {**ENGINE, "model": str(model), **settings}, "batches": batches, "max_tokens": max_tokens}
    answer = engines.run(job)
    assert ("error" in answer) == fails, answer
    return answer["error"] if fails else answer


def tokens_of(result, batch: int = 0) -> list[list[int]]:
    return [tokens for tokens, _ in result["batches"][batch]]


@torch.no_grad()
def own_tokens(model, prompts, max_tokens: int = 16, piece: int = PIECE, block: int = 1) -> list[list[int]]:
    """Greedy tokens of our own `generate()` with the engine's cache: sinks, no window, blocks packed when full.

    A block is one token where its codes depend on no other.
    """
    tokens = []
    for prompt in prompts:
        cache = model.create_kivi_cache(residual_length=0, group_size=block)
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "prefill_chunk_size": piece}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, pad_token_id=0, **limits
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def prompts_of(vocabulary: int) -> list[list[int]]:
    """16 prompts: short ones, one of a piece, longer ones, and four that share their first three pieces."""
    generator = torch.Generator().manual_seed(1)

    def random(length: int) -> list[int]:
        return torch.randint(5, vocabulary, (length,), generator=generator).tolist()

    shared = random(3 * PIECE)
    lengths = (1, 2, 3, 4, 5, 17, 31, 32, 64, 65, 130, 300)
    return [*map(random, lengths), *(shared + random(n) for n in (3, 9, 40, 70))]


def look_up(drafts: int) -> dict:
    """So many drafts at a time, which are looked up in the text."""
    return {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def saved(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def calibrated(path: Path, budget: float) -> Path:
    """The toy at a budget: three layers and both sides share a latent, tiers, scales of tokens."""
    how = ["--budget", str(budget), "--layer_group_size", "3", "--text", "stdlib:calibration", "--windows", "4"]
    command = [sys.executable, "scripts/calibrate_svd_ranks.py", *how, "--output", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


@pytest.fixture(scope="module")
def sixteenth(tmp_path_factory) -> Path:
    return calibrated(tmp_path_factory.mktemp("served") / "sixteenth", 0.0625)


@pytest.mark.parametrize("budget", [0.125, 0.0625])
def test_tokens_are_those_of_our_own_cache(budget, request, tmp_path, engines):
    """Sixteen prompts at once, of all lengths; four share a prefix, three of them after the first has been served."""
    path = request.getfixturevalue("sixteenth") if budget == 0.0625 else calibrated(tmp_path / "eighth", budget)
    model = ALRDLlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    result = run_engine(engines, path, [prompts[:13], prompts[13:]])
    assert tokens_of(result) + tokens_of(result, 1) == own_tokens(model, prompts)
    assert [cached for _, cached in result["batches"][1]] == [3 * PIECE] * 3


def test_a_shared_prefix_is_computed_once(sixteenth, engines):
    # Real text: where the likeliest tokens are as good as tied, rounding decides.
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    first, second = [tokenizer(document.text).input_ids for document in load_documents("stdlib:test")[:2]]
    text = first[:825]
    other = [*text[:768], *second[100:157]]
    # vLLM lets a request that is alone have the whole step.
    result = run_engine(engines, sixteenth, [[text], [other]], max_num_batched_tokens=PIECE, max_num_seqs=8)
    assert [batch[0][1] for batch in result["batches"]] == [0, 768]
    model = ALRDLlamaForCausalLM.from_pretrained(sixteenth, dtype=torch.float32).eval()
    assert tokens_of(result) + tokens_of(result, 1) == own_tokens(model, [text, other])


@pytest.fixture(scope="module")
def lossless(tmp_path_factory, engines):
    """A dense model, its split models of full rank at 16 bits, and the tokens of stock vLLM."""
    path = tmp_path_factory.mktemp("lossless")
    dense = tiny_dense(head_dim=32)
    prompts = prompts_of(97)
    return dense, prompts, tokens_of(run_engine(engines, saved(dense, path / "stock"), [prompts]))


ROTATED = {"k_scheme": {"rotation": True}, "v_scheme": {"rotation": True}}


@pytest.mark.parametrize(
    ("blocks", "pages", "drafts"),
    [
        ({"joint_kv": True, "layer_group_size": 2, "k_bits": 16}, None, None),
        ({"layer_group_size": 3, "head_group_size": 2, "k_bits": 16, "v_bits": 16, "sink_length": 0}, 17, None),
        (None, None, None),
        ({"joint_kv": True, "layer_group_size": 3, "k_bits": 16}, None, 4),
        # Rotated: packed when a page is full. With few pages, and with drafts.
        ({"layer_group_size": 3, "head_group_size": 2, "k_bits": 16, "v_bits": 16, **ROTATED}, 17, None),
        ({"joint_kv": True, "layer_group_size": 2, "k_bits": 16, "k_scheme": {"rotation": True}}, None, 20),
    ],
)
def test_lossless_settings_give_the_tokens_of_stock_vllm(lossless, tmp_path, engines, blocks, pages, drafts):
    """Blocks of layers, joint or not, and layers by themselves, all sixteen prompts at once.

    With 17 pages, 512 tokens, they do not fit at once, and requests are preempted; else those that share a prefix read
    it while it is computed. Drafts that are looked up in the text are mostly rejected, and their places written anew.
    """
    dense, prompts, expected = lossless
    if blocks is None:
        ranks = all_ranks(3, 128)
        del ranks["model.layers.1.self_attn.k_proj"]
        model = tiny_split(tmp_path, ranks, head_group_size=2, dense=dense, k_bits=16, v_bits=16)
    else:
        model = tiny_blocks(dense, **blocks)
    few = {} if pages is None else {"num_gpu_blocks_override": pages, "max_model_len": 32 * (pages - 1)}
    if drafts is not None:
        few["speculative_config"] = look_up(drafts)
        # Such an engine leaves a process in which no other one starts.
        engines = Engines(tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    result = run_engine(engines, saved(model, tmp_path / "split"), [prompts], **few)
    if drafts is not None:
        engines.close()
    assert tokens_of(result) == expected
    shared = [cached for _, cached in result["batches"][0][13:]]
    assert pages or min(shared) >= PAGE


@pytest.mark.parametrize("blocks", [None, {"layer_group_size": 3, "joint_kv": True}])
def test_scales_that_are_measured(tmp_path, engines, blocks):
    """The default scheme, by layers and by blocks: pages are packed when they are full, and read as they are before."""
    dense, prompts = tiny_dense(head_dim=32), prompts_of(97)
    fields = {"k_bits": 4, "group_size": PAGE, "sink_length": 0}
    if blocks is None:
        model = tiny_split(tmp_path, 24, head_group_size=2, dense=dense, v_bits=4, **fields)
    else:
        model = tiny_blocks(dense, **blocks, **fields)
    result = run_engine(engines, saved(model, tmp_path / "split"), [prompts[:13], prompts[13:]])
    assert tokens_of(result) + tokens_of(result, 1) == own_tokens(model, prompts, block=PAGE)
    assert [cached for _, cached in result["batches"][1]] == [3 * PIECE] * 3


@pytest.mark.parametrize("head_group_size", [None, 2])
def test_two_processes_share_the_heads(lossless, tmp_path, head_group_size):
    """A latent of all heads is summed up over them and held by both; head groups are dealt out."""
    dense, prompts, expected = lossless
    model = tiny_blocks(dense, joint_kv=True, layer_group_size=3, k_bits=16, head_group_size=head_group_size)
    # An engine with processes of its own, as a server has it.
    engines = Engines(tmp_path)
    result = run_engine(engines, saved(model, tmp_path / "split"), [prompts], tensor_parallel_size=2)
    engines.close()
    assert tokens_of(result) == expected


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_other_architectures_by_layers_with_packed_latents(architecture, tmp_path, engines):
    """Layers by themselves, latents of head groups, packed by calibrated scales."""
    fields = {**TINY_LLAMA, "tie_word_embeddings": architecture == "qwen2"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**fields)).eval()
        randomize_vectors(dense)
    static = {"static": True, "orientation": "per_channel"}
    static = {"k_scheme": static, "v_scheme": {**static, "code": "trellis"}}
    ranks = {"truncation_ranks": all_ranks(3, {"k_proj": 24, "v_proj": [12, 20]}), "head_group_size": 2}
    config = ALRDLlamaConfig.from_llama(dense.config, k_bits=5, v_bits=3, **ranks, **static)
    scales = {f"{side}_proj": {"static_scales": (torch.ones(n), torch.zeros(n))} for side, n in (("k", 24), ("v", 32))}
    model = ALRDLlamaForCausalLM.from_dense(dense, config, [scales] * 3)
    set_ranges(model)
    prompts = prompts_of(97)
    result = run_engine(engines, saved(model, tmp_path / "split"), [prompts[:13], prompts[13:]])
    assert tokens_of(result) + tokens_of(result, 1) == own_tokens(model, prompts)


#: Models of vLLM's own, and of the library's run by vLLM: experts, multipliers, norms of heads and over all of them,
#: norms behind the layers, fused projections, layers without RoPE, RoPE of neighbours and of a part of the channels.
BESIDE_STOCK = ("qwen3", "ernie4_5", "mixtral", "qwen3_moe", "granite", "granitemoe", "olmo2", "olmoe", "gemma")
BESIDE_STOCK += ("gemma3_text", "phi3", "smollm3", "cohere", "glm4", "apertus")

#: What vLLM's models read of a configuration beside the fields of its class, or otherwise than these, of sizes that fit
#: its attention on a CPU.
VLLM_FIELDS = {
    "apertus": {"hidden_size": 256},
    "flex_olmo": {"moe_intermediate_size": 96},
    "helium": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4},
    "hy_v3": {"expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "starcoder2": {"hidden_size": 256},
}


def dense_for_vllm(kind: str, **fields):
    """A random model of a size that vLLM's attention takes; where its heads share the hidden channels, of more."""
    config = dense_config(kind, **{"head_dim": 32} | VLLM_FIELDS.get(kind, {}) | fields)
    if "head_dim" not in type(config).__dataclass_fields__:
        config = dense_config(kind, **{"hidden_size": 256, "head_dim": None} | VLLM_FIELDS.get(kind, {}) | fields)
    return random_model(config)


@pytest.mark.parametrize("kind", BESIDE_STOCK)
def test_architectures_give_the_tokens_of_stock_vllm(kind, tmp_path, engines):
    """Lossless, blocks of two layers; then an eighth of the bytes, against our own cache."""
    dense, prompts = dense_for_vllm(kind), prompts_of(97)
    expected = tokens_of(run_engine(engines, saved(dense, tmp_path / "stock"), [prompts]))
    model = tiny_blocks(dense, layer_group_size=2, k_bits=16, v_bits=16)
    assert tokens_of(run_engine(engines, saved(model, tmp_path / "split"), [prompts])) == expected
    text = torch.randint(1, 97, (8, 140), generator=torch.Generator().manual_seed(1))
    model = fitted(dense, text, tmp_path, 0.125, layer_group_size=3, joint_kv=True).split()
    model.save_pretrained(tmp_path / "eighth")
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "eighth")
    few = prompts[3:12:2]
    assert tokens_of(run_engine(engines, tmp_path / "eighth", [few], 8)) == own_tokens(model, few, 8)


#: The others of the table, of those that this release of the library has.
OTHERS = [kind for kind in ARCHITECTURES if kind in CONFIG_MAPPING and kind not in BESIDE_STOCK]
OTHERS = [kind for kind in OTHERS if kind not in ("llama", "mistral", "qwen2", "aria_text", "minimax_m2", "phimoe")]


@pytest.mark.parametrize("kind", OTHERS)
def test_architectures_give_the_tokens_of_our_own_cache(kind, tmp_path, engines):
    dense, prompts = dense_for_vllm(kind), prompts_of(97)
    model = tiny_blocks(dense, layer_group_size=2, head_group_size=2, k_bits=16, v_bits=16)
    assert tokens_of(run_engine(engines, saved(model, tmp_path), [prompts], 8)) == own_tokens(model, prompts, 8)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("kind", "fields", "blocks", "beside_stock"),
    [
        ("mistral", {"sliding_window": 40}, {}, True),
        ("mistral", {"sliding_window": 100}, {"layer_group_size": 3, "joint_kv": True}, True),
        ("gemma3_text", {"sliding_window": 48, "layer_types": [SLIDING, FULL, SLIDING]}, {}, True),
        # vLLM's own refuses windows in some of the layers; the other one's are a token longer than the library's.
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 48}, None, False),
        ("cohere2", {"sliding_window": 48, "layer_types": [SLIDING, FULL, SLIDING]}, {}, False),
    ],
)
def test_sliding_windows(kind, fields, blocks, beside_stock, tmp_path, engines):
    """Shorter than the prompts and their pieces, and longer ones; shared prefixes are read while they are computed."""
    dense, prompts = dense_for_vllm(kind, **fields), prompts_of(97)
    if blocks is None:
        model = tiny_split(tmp_path, dense.config.num_key_value_heads * 32, 2, dense, k_bits=16, v_bits=16)
    else:
        model = tiny_blocks(dense, k_bits=16, v_bits=16, **blocks)
    windows = [model.config.layer_window(layer) for layer in range(3)]
    assert any(windows)
    result = run_engine(engines, saved(model, tmp_path / "split"), [prompts, prompts[13:]])
    # Where all layers have a window, vLLM shares what has been computed, not what is.
    assert all(windows) or min(cached for _, cached in result["batches"][0][13:]) >= PAGE
    assert [cached for _, cached in result["batches"][1]] == [192, 224, 256]
    assert tokens_of(result) == own_tokens(model, prompts)
    assert tokens_of(result, 1) == tokens_of(result)[13:]
    if beside_stock:
        assert tokens_of(result) == tokens_of(run_engine(engines, saved(dense, tmp_path / "stock"), [prompts]))


def test_windows_of_packed_latents(tmp_path, engines):
    """An eighth of the bytes; pieces of eight windows; and texts of 1,100 tokens in 14 pages, which hold 448."""
    dense = dense_for_vllm("mistral", sliding_window=48)
    text = torch.randint(1, 97, (8, 140), generator=torch.Generator().manual_seed(1))
    fitted(dense, text, tmp_path, 0.125, layer_group_size=3, joint_kv=True).split().save_pretrained(tmp_path / "eighth")
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "eighth")
    prompts = [text.flatten()[:n].tolist() for n in (600, 47, 48, 49)]
    result = run_engine(engines, tmp_path / "eighth", [prompts], long_prefill_token_threshold=384)
    assert tokens_of(result) == own_tokens(model, prompts, piece=384)
    prompts = [text.flatten()[:1100].tolist(), text.flatten()[5:1105].tolist()]
    few = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 128, "max_num_seqs": 2}
    assert tokens_of(run_engine(engines, tmp_path / "eighth", [prompts], **few)) == own_tokens(model, prompts)


@torch.no_grad()
def set_ranges(model) -> None:
    """Scales from the ranges of the latents on random tokens; points of a trellis are 256 levels."""
    seen = {}

    def see(module, arguments, latents):
        seen[module] = latents.flatten(0, 1)

    projections = [p for layer in model.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    hooks = [projection.BLinear.register_forward_hook(see) for projection in projections]
    model(torch.randint(5, 97, (2, 200)), use_cache=False)
    for hook in hooks:
        hook.remove()
    for i, projection in enumerate(projections):
        low, high = seen[projection.BLinear].aminmax(dim=0)
        projection.latent_scale.copy_((high - low) / (31 if i % 2 == 0 else 255))
        projection.latent_zero_point.copy_(low)


def test_tokens_that_fit_in_a_gibibyte(sixteenth, engines):
    """Within 1% of what the bytes of the codes say, and at least 14 times what the dense model's would be."""
    settings = {"dtype": "bfloat16", "block_size": 128, "kv_cache_memory_bytes": 1 << 30}
    tokens = 128 * run_engine(engines, sixteenth, [[[1, 2, 3]]], **settings)["blocks"]
    config = ALRDLlamaConfig.from_pretrained(sixteenth)
    bits = 0
    for block in config.blocks():
        # One byte for the scale of a token and head group.
        bits += 8 * config.num_head_groups
        for group in config.group_tiers(block):
            bits += sum(channels * width for channels, width in group)
    assert tokens == pytest.approx(8 * 2**30 / bits, rel=0.01)
    dense = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert tokens >= 14 * 2**30 / dense


@pytest.mark.parametrize(
    ("fields", "settings", "rule"),
    [
        ({"use_kivi": False}, {}, "use_kivi=False: must be True"),
        ({"k_bits": 16, "v_bits": 16}, {"block_size": 16}, "block_size=16: must be a multiple of 32"),
        ({"k_bits": 16, "v_bits": 16}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8': must be 'auto'"),
        # The last one: such an engine leaves a process in which no other one starts.
        (
            {},
            {"speculative_config": look_up(32)},
            "num_speculative_tokens=32: must be at most 31 where pages are packed",
        ),
    ],
)
def test_what_is_not_served_is_refused_at_the_start(tmp_path, engines, fields, settings, rule):
    model = saved(tiny_split(tmp_path, 8, **fields), tmp_path / "split")
    assert rule in run_engine(engines, model, [[[1, 2, 3]]], fails=True, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "rule"),
    [
        ("phimoe", {}, "dense_model_type='phimoe': must be none of aria_text, minimax_m2, phimoe"),
        ("olmo2", {"tensor_parallel_size": 2}, "tensor_parallel_size=2: must be 1 for 'olmo2'"),
    ],
)
def test_architectures_that_are_not_served(tmp_path, kind, settings, rule):
    model = tiny_blocks(dense_for_vllm(kind), k_bits=16, v_bits=16)
    # An engine with processes of its own, whose errors are in what they print.
    engines = Engines(tmp_path)
    run_engine(engines, saved(model, tmp_path / "split"), [[[1, 2, 3]]], fails=True, **settings)
    engines.close()
    assert rule in engines.log.read_text()
