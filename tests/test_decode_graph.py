"""Decode steps that `generate` replays: on the CPU a graph that runs the step again stands in for CUDA's."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, GenerationMixin, MistralConfig, MistralForCausalLM

from modeling_alrd_llama import CAPACITY_STEP, ALRDLlamaForCausalLM
from modules.decode_graph import DecodeGraph
from modules.kivi_cache import KIVILatentCache
from tests.helpers import TINY_LLAMA, tiny_dense, tiny_split

#: Blocks so small that much happens within few tokens.
SMALL = {"k_bits": 2, "v_bits": 2, "group_size": 20, "residual_length": 5, "sink_length": 4}


class StandInGraph:
    """Captures without effect, as a CUDA graph does, and runs the step again at every replay, into the same tensors."""

    captured: list["StandInGraph"] = []

    def __init__(self):
        self.replays, self.run, self.outputs = 0, None, None
        StandInGraph.captured.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.outputs.logits.copy_(self.run().logits)


@contextmanager
def stand_in_capture(graph: StandInGraph, **_):
    """Take back what the captured step has done to the cache."""
    calls = []
    forward = ALRDLlamaForCausalLM.forward

    def spied(self, **inputs):
        cache = inputs["past_key_values"]
        before = copy.deepcopy([layer.store.tensors for layer in cache.layers])
        outputs = forward(self, **inputs)
        for layer, tensors in zip(cache.layers, before, strict=True):
            for name, tensor in layer.store.tensors.items():
                tensor.copy_(tensors[name])
        calls.append((lambda: forward(self, **inputs), outputs))
        return outputs

    ALRDLlamaForCausalLM.forward = spied
    try:
        yield
    finally:
        ALRDLlamaForCausalLM.forward = forward
    ((graph.run, graph.outputs),) = calls


@pytest.fixture
def on_cuda(monkeypatch):
    """The machine as `generate` sees it: one CUDA device, whose graphs are stand-ins. The tensors stay on the CPU."""
    StandInGraph.captured = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", stand_in_capture)

    def criteria(self, model_kwargs, generation_config):
        cache = model_kwargs.get("past_key_values")
        return not generation_config.disable_compile and cache is not None and cache.is_compileable

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", criteria)
    monkeypatch.setattr("modeling_alrd_llama.captures_graphs", lambda model: True)


@pytest.fixture
def model(tmp_path):
    return tiny_split(tmp_path, 24, 2, dense=tiny_dense(num_hidden_layers=2), **SMALL)


def prompt(batch: int = 2, length: int = 40) -> dict:
    mask = torch.arange(length) >= torch.tensor([11, 0, 3])[:batch, None]
    ids = torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": mask.long()}


MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "two samples a prompt": {"do_sample": True, "num_return_sequences": 2},
    "early end": {"do_sample": False, "eos_token_id": list(range(1, 40)), "pad_token_id": 0},
    "prompt in pieces": {"do_sample": False, "prefill_chunk_size": 16},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_the_same_tokens(model, on_cuda, how):
    texts = []
    for switch in ({"disable_compile": True}, {}):
        torch.manual_seed(1)
        texts.append(model.generate(**prompt(), max_new_tokens=60, **how, **switch))
    assert torch.equal(*texts)
    (graph,) = StandInGraph.captured if texts[0].shape[1] > 42 else (None,)
    assert graph is None or graph.replays == texts[0].shape[1] - 42


def test_a_capture_takes_the_first_token_of_a_long_text(model, on_cuda):
    model.generate(**prompt(), max_new_tokens=2, do_sample=False)
    assert not StandInGraph.captured  # one step, which runs as it is
    model.generate(**prompt(), max_new_tokens=40, do_sample=False)
    assert [graph.replays for graph in StandInGraph.captured] == [38]


FALLBACKS = {
    "beams": {"num_beams": 3},
    "look-up": {"prompt_lookup_num_tokens": 4},
    "attention weights": {"output_attentions": True, "return_dict_in_generate": True},
    "switched off": {"disable_compile": True},
    "dense cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", FALLBACKS.values(), ids=FALLBACKS)
def test_what_cannot_be_replayed_runs_as_it_is(model, on_cuda, how, monkeypatch):
    asked = {**prompt(1 if "prompt_lookup_num_tokens" in how else 2), "max_new_tokens": 30, "do_sample": False}
    found = model.generate(**asked, **how)
    monkeypatch.undo()
    expected = model.generate(**asked, **how)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert not StandInGraph.captured


def test_steps_with_more_than_tokens_run_as_they_are(model, on_cuda):
    """Hidden states of a step would be overwritten by the next one."""
    asked = {**prompt(), "max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**asked, output_hidden_states=True)
    expected = model.generate(**asked, output_hidden_states=True, disable_compile=True)
    assert not StandInGraph.captured
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine[-1], theirs[-1])


def test_a_returned_cache_grows(model, on_cuda):
    asked = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    turns = []
    for switch in ({}, {"disable_compile": True}):
        first = model.generate(**prompt(), **asked, **switch)
        cache = first.past_key_values
        assert cache.capacity is None and cache.row_tokens() == [58, 69]
        more = torch.cat([first.sequences, torch.ones((2, CAPACITY_STEP), dtype=torch.long)], 1)
        mask = torch.nn.functional.pad(prompt()["attention_mask"], (0, more.shape[1] - 40), value=1)
        turns.append(
            model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
        )
        cache.fork().batch_repeat_interleave(2)
    assert torch.equal(*turns)


def test_a_cache_of_the_users_own_is_kept(model, on_cuda):
    cache = model.create_kivi_cache()
    model.generate(**prompt(), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert cache.row_tokens() == [48, 59] and not StandInGraph.captured
    fixed = model.create_kivi_cache(capacity=100)
    result = model.generate(
        **prompt(), past_key_values=fixed, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert result.past_key_values is fixed and len(StandInGraph.captured) == 1


def test_schemes_of_no_fixed_size_grow(tmp_path, on_cuda):
    model = tiny_split(tmp_path, 24, **(SMALL | {"k_scheme": {"rotation": True}}))
    found = model.generate(**prompt(), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, KIVILatentCache) and not StandInGraph.captured


@pytest.mark.parametrize("rope_type", ["dynamic", "linear"])
def test_frequencies_that_follow_the_length_are_not_captured(tmp_path, on_cuda, rope_type):
    """The library reads the longest position on the host, which a capture cannot, to choose them."""
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_split(tmp_path, 24, dense=tiny_dense(num_hidden_layers=2, rope_parameters=rope), **SMALL)
    model.generate(**prompt(), max_new_tokens=20, do_sample=False)
    assert len(StandInGraph.captured) == (rope_type == "linear")


def test_a_refused_capture_is_said(model, on_cuda, monkeypatch):
    @contextmanager
    def refuse(graph, **_):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    asked = {**prompt(), "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**asked)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="not replayed from a CUDA graph: operation not permitted"):
        assert torch.equal(model.generate(**asked), expected)


def test_a_capture_refused_within_the_step_leaves_the_cache_whole(model, on_cuda, monkeypatch):
    capturing = []

    @contextmanager
    def capture(graph, **_):
        capturing.append(graph)
        try:
            yield
        finally:
            capturing.clear()

    def refuse(layer, inputs):
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    asked = {**prompt(), "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**asked, disable_compile=True)
    model.model.layers[0].register_forward_pre_hook(refuse)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="not replayed from a CUDA graph: operation not permitted"):
        assert torch.equal(model.generate(**asked), expected)


@pytest.mark.parametrize("chunk", [4, 17])
def test_pads_beyond_the_first_chunk_of_a_prompt(model, on_cuda, chunk):
    """Short steps of a fixed capacity have no pads: the cache grows."""
    asked = prompt()
    asked["attention_mask"][0, :38] = 0
    texts = [
        model.generate(**asked, max_new_tokens=20, do_sample=False, prefill_chunk_size=chunk, **switch)
        for switch in ({}, {"disable_compile": True})
    ]
    assert torch.equal(*texts)


def test_a_step_within_a_sliding_window_is_replayed(tmp_path, on_cuda):
    """The text outgrows the window while the graph is replayed: as a cache that grows gives it."""
    dense = MistralForCausalLM(MistralConfig(**TINY_LLAMA, sliding_window=45))
    model = tiny_split(tmp_path, 24, 2, dense=dense.eval(), **SMALL)
    asked = {**prompt(), "max_new_tokens": 20, "do_sample": False}
    found = model.generate(**asked, return_dict_in_generate=True)
    assert found.past_key_values.row_tokens() == [48, 59] and len(StandInGraph.captured) == 1
    assert torch.equal(found.sequences, model.generate(**asked, disable_compile=True))


def test_capacity_is_rounded_up(model, on_cuda):
    for length, capacity in (
        (10, CAPACITY_STEP),
        (CAPACITY_STEP - 39, CAPACITY_STEP),
        (CAPACITY_STEP, 2 * CAPACITY_STEP),
    ):
        found = []
        step = DecodeGraph.__call__

        def spied(self, input_ids, past_key_values, found=found, step=step, **arguments):
            found.append(past_key_values.capacity)
            raise StopIteration

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodeGraph, "__call__", spied)
            with pytest.raises(StopIteration):
                model.generate(**prompt(), max_new_tokens=length, do_sample=False)
        assert found == [capacity]


# ---- the library's own compilation


def test_generate_compiles_one_graph_without_a_break(model):
    """Asked for by a `compile_config`, and with a cache that `generate` makes: nothing of the step is left out."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=False, backend=compiler, mode=None)
    config._compile_all_devices = True
    expected = model.generate(**prompt(), max_new_tokens=40, do_sample=False)
    torch._dynamo.utils.counters.clear()
    found = model.generate(**prompt(), max_new_tokens=40, do_sample=False, compile_config=config)
    assert torch.equal(found, expected)
    assert len(graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]
    nodes = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("attend_and_append" in node for node in nodes) == 2


def test_a_growing_cache_is_not_traced(model):
    """It would be compiled again at every block; its steps run as they are."""
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter)
    ids = torch.randint(1, 97, (2, 100))
    logits = []
    for forward in (model, step):
        cache = model.create_kivi_cache()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            logits.append(torch.cat([forward(ids[:, t : t + 1], past_key_values=cache).logits for t in range(100)], 1))
    assert torch.equal(*logits)
    assert counter.frame_count == 0


def test_inductor_reads_lengths_before_they_change(model):
    """Positions of the second layer are those of the first, which has taken the token already."""
    ids = torch.randint(1, 97, (2, 60))
    logits = []
    with torch.no_grad():
        for forward in (model, torch.compile(model, backend="inductor", fullgraph=True)):
            cache = model.create_kivi_cache(capacity=80, k_bits=16, v_bits=16)
            model(ids[:, :50], past_key_values=cache)
            logits.append(
                torch.cat([forward(ids[:, t : t + 1], past_key_values=cache).logits for t in range(50, 60)], 1)
            )
    assert (logits[0] - logits[1]).abs().max() < 1e-4


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_replayed_steps_on_a_gpu(model, how):
    """Exactly what the same kernels give without a graph: over the same capacity, step by step."""
    model = model.cuda()
    asked = {name: tensor.cuda() for name, tensor in prompt().items()} | {"max_new_tokens": 60, **how}
    rows = 2 * how.get("num_return_sequences", 1)
    replays, texts = [], []
    replay = torch.cuda.CUDAGraph.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self)))
        for settings in ({}, {"past_key_values": model.create_kivi_cache(capacity=CAPACITY_STEP)}):
            torch.manual_seed(1)
            texts.append(model.generate(**asked, **settings, **({"disable_compile": True} if settings else {})))
            assert len(texts[-1]) == rows
    assert torch.equal(*texts)
    assert len(replays) == max(0, texts[0].shape[1] - 42)


@pytest.mark.gpu
def test_kernels_are_compiled_before_their_step(model):
    """All that the step needs, and the cache is as it was."""
    from modules.kernels.triton import attention  # the mode of Triton is settled by now

    model = model.cuda()
    ids = torch.randint(1, 97, (2, 91), device="cuda")
    cache = model.create_kivi_cache(capacity=120)
    compiled = [kernel.device_caches[0][0] for kernel in (attention._attention_kernel, attention._merge_kernel)]
    with torch.no_grad():
        model(ids[:, :90], past_key_values=cache)
        for kernels in compiled:
            kernels.clear()
        model.compile_step(ids[:, 90:], cache)
        counts = list(map(len, compiled))
        logits = model(ids[:, 90:], past_key_values=cache).logits
        again = model.create_kivi_cache(capacity=120)
        model(ids[:, :90], past_key_values=again)
        expected = model(ids[:, 90:], past_key_values=again).logits
    assert min(counts) and list(map(len, compiled)) == counts
    assert torch.equal(logits, expected)


@pytest.mark.gpu
def test_a_compiled_step_on_a_gpu(model):
    """One graph, also inside CUDA graphs, the tokens of eager steps."""
    model = model.cuda()
    ids = torch.randint(1, 97, (2, 90), device="cuda")
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    logits = []
    with torch.no_grad():
        for forward in (model, step):
            cache = model.create_kivi_cache(capacity=100, k_bits=8, v_bits=8)
            model(ids[:, :50], past_key_values=cache)
            pieces = [forward(ids[:, t : t + 1], past_key_values=cache).logits.clone() for t in range(50, 90)]
            logits.append(torch.cat(pieces, 1))
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
