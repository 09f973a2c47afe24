"""The decode benchmarks: small shapes, in process; that their gates can fail, and that their tables are complete."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.budget import cache_nbytes
from modules.kernels import Backend
from scripts import (
    attention_peers,
    benchmark_attention,
    benchmark_blocks,
    benchmark_decode,
    benchmark_prefix,
    benchmark_vllm,
    results_tables,
)
from scripts.attention_peers import PEERS, DenseStates, Ggml, relative_error
from scripts.benchmark_attention import (
    AttentionBenchmarkConfig,
    LatentLayer,
    cases,
    in_a_graph,
    measure_case,
    seconds_in_turns,
)
from scripts.benchmark_blocks import BlocksBenchmarkConfig, BlockSubject
from scripts.benchmark_decode import DecodeBenchmarkConfig, Subject

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def attention_options(**fields) -> AttentionBenchmarkConfig:
    return AttentionBenchmarkConfig(**{"quick": True, "threads": 1, "backend": "reference", "seconds": 1.0, **fields})


def decode_options(**fields) -> DecodeBenchmarkConfig:
    return DecodeBenchmarkConfig(**{"quick": True, "threads": 1, "backend": "reference", **fields})


def blocks_options(**fields) -> BlocksBenchmarkConfig:
    return BlocksBenchmarkConfig(**{"quick": True, "threads": 1, "backend": "reference", **fields})


def layer(scheme=None, batch: int = 2, length: int = 517, **fields) -> LatentLayer:
    scheme = {"rank": 0.5, "head_group_size": 1, "bits": 3} | (scheme or {})
    return LatentLayer(attention_options(**fields), scheme, length, batch)


@pytest.fixture(scope="module")
def attention_run(tmp_path_factory) -> tuple[AttentionBenchmarkConfig, dict]:
    """A whole quick run with the back end that a user gets."""
    path = tmp_path_factory.mktemp("attention") / "record.json"
    options = attention_options(backend=None, output=str(path))
    return options, benchmark_attention.main(options)


@pytest.fixture(scope="module")
def decode_run(tmp_path_factory) -> tuple[DecodeBenchmarkConfig, dict]:
    path = tmp_path_factory.mktemp("decode") / "record.json"
    options = decode_options(backend=None, output=str(path))
    return options, benchmark_decode.main(options)


@pytest.fixture(scope="module")
def blocks_run(tmp_path_factory) -> tuple[BlocksBenchmarkConfig, dict]:
    path = tmp_path_factory.mktemp("blocks") / "record.json"
    options = blocks_options(output=str(path))
    return options, benchmark_blocks.main(options)


def wrong_back_end(monkeypatch, subject: type[Subject], wrong: dict) -> list:
    """Give the first cache that a subject makes a back end of another name, whose attention alone is wrong.

    Returns:
        The caches that are made; once they are taken out, the next one is the first again.
    """
    attend, new_cache, caches = Backend.attend, subject.latent_cache, []

    def of_another_name(self, *size) -> object:
        cache = new_cache(self, *size)
        if not caches:
            for layer in cache.layers:
                layer.backend = replace(layer.backend, name="another")
        caches.append(cache)
        return cache

    def wrong_attend(self, query, *arguments):
        factors = wrong if self.name == "another" else {}
        query = replace(query, states=query.states * factors.get("query", 1.0))
        attended = attend(self, query, *arguments)
        return attended._replace(summed=attended.summed * factors.get("summed", 1.0))

    monkeypatch.setattr(subject, "latent_cache", of_another_name)
    monkeypatch.setattr(Backend, "attend", wrong_attend)
    return caches


def broken(monkeypatch, factor: float) -> None:
    """Make the attention of every back end but the reference's own functions wrong."""
    attend = Backend.attend

    def wrong(self, *arguments):
        attended = attend(self, *arguments)
        return attended._replace(summed=attended.summed * factor)

    monkeypatch.setattr(Backend, "attend", wrong)


# ---- one layer


def test_attention_record_is_complete(attention_run):
    options, record = attention_run
    assert json.loads(Path(options.output).read_text()) == record
    assert record["environment"]["threads"] == record["key"]["threads"] == 1
    assert {"cpu", "torch", "transformers", "commit", "hqq", "optimum-quanto"} <= set(record["environment"])
    assert all(value > 0 for value in record["machine"].values())
    assert list(record["cases"]) == [name for name, *_ in cases(options)]
    assert len(record["cases"]) == 2 * (2 + 1)  # lengths, ranks and the joint one
    chosen = layer(backend=None).layer.backend
    for i, case in enumerate(record["cases"].values()):
        assert case["backend"] == str(chosen)
        assert case["fused"] == (chosen.fused_attention is not None)
        assert 0 < case["gate"]["ours"] <= 2 * case["gate"]["plain"]
        assert case["append"]["tokens"] == 128 and case["append"]["blocks_packed"] == 1
        assert 0 < case["append"]["mean_s"] < case["seconds"]["p50"]
        assert case["seconds"]["p20"] <= case["seconds"]["p50"] <= case["seconds"]["p80"]
        assert case["nbytes"] < case["dense_nbytes"] / 2
        assert min(case["macs"], case["bandwidth_share"], case["peak_share"], case["int8_peak_share"]) > 0
        first = i % 3 == 0
        assert set(case["peers"]) == ({n for n, p in PEERS.items() if "cpu" in p.devices} if first else {"by hand"})
        for name, peer in case["peers"].items():
            if "left_out" in peer:
                assert PEERS[name].needs and peer["left_out"].endswith("is not installed")
                continue
            assert peer["rounds"] == 3
            assert peer["speedup"] == pytest.approx(peer["seconds"]["p50"] / peer["ours_seconds"]["p50"])
            assert peer["error"] is None if name == "unpack" else peer["error"] > 0
    assert set(case["peers"]["by hand"]["settings"]) == {"scores", "sums"}


def test_attention_goes_on_where_it_stopped(attention_run, tmp_path, monkeypatch):
    options, record = attention_run
    half = dict(list(record["cases"].items())[:4])
    output = tmp_path / "half.json"
    output.write_text(json.dumps(record | {"cases": half}))
    measured = []
    monkeypatch.setattr(benchmark_attention, "describe", lambda case: "")
    monkeypatch.setattr(
        benchmark_attention, "measure_case", lambda options, *case: measured.append(case) or record["cases"][next_()]
    )
    names = iter(list(record["cases"])[4:])
    next_ = names.__next__
    again = benchmark_attention.main(replace(options, output=str(output)))
    assert len(measured) == len(record["cases"]) - 4
    assert list(again["cases"]) == list(record["cases"])
    first = next(iter(half))
    output.write_text(json.dumps(record | {"cases": record["cases"] | {first: half[first] | {"peers": {}}}}))
    names = iter([first])
    next_ = names.__next__
    assert benchmark_attention.main(replace(options, output=str(output)))["cases"] == record["cases"]
    with pytest.raises(ValueError, match=r"holds cases of other options \(seed\)"):
        benchmark_attention.main(replace(options, output=str(output), seed=1))
    key = {name: value for name, value in record["key"].items() if name != "spread"}
    output.write_text(json.dumps(record | {"key": key}))  # as of before, when quartiles were recorded
    with pytest.raises(ValueError, match=r"holds cases of other options \(spread\)"):
        benchmark_attention.main(replace(options, output=str(output)))


@pytest.mark.parametrize("factor", [1.03, 0.0, float("nan")])
def test_the_gate_stops_wrong_attention(factor, tmp_path, monkeypatch):
    broken(monkeypatch, factor)
    output = tmp_path / "record.json"
    with pytest.raises(RuntimeError, match=r"correctness gate: error .* of reference, row 0"):
        benchmark_attention.main(attention_options(output=str(output)))
    assert not output.exists()


def test_the_gate_looks_at_the_last_row(monkeypatch):
    ours = layer(batch=3)
    attend = ours.attend

    def wrong() -> torch.Tensor:
        output = attend()
        output[2] += output[2].roll(1, 0)
        return output

    assert ours.check()["ratio"] < 2
    monkeypatch.setattr(ours, "attend", wrong)
    with pytest.raises(RuntimeError, match="row 2"):
        ours.check()


def test_a_wrong_peer_stops_the_run(monkeypatch):
    monkeypatch.setattr(attention_peers, "transformers_sdpa", lambda config, query, *states: query[:, :, 0])
    options = attention_options(peers=["DynamicCache"])
    machine = {"bytes_per_s": 1.0, "bfloat16_macs_per_s": 1.0, "int8_macs_per_s": 1.0}
    with pytest.raises(RuntimeError, match=r"of DynamicCache is above 0\.05; no figures"):
        measure_case(options, 512, 1, options.schemes()[0], ["DynamicCache"], machine)


@pytest.mark.parametrize(("group", "bits"), [(1, 2), (2, 3), (1, 4)])
def test_the_reference_of_the_gate(group, bits):
    """What it reads is what the cache reads, and its attention that of the dense model, by another way."""
    ours = layer({"head_group_size": group, "bits": bits})
    assert ours.layer.get_seq_length() == 516 and ours.layer.pool.used >= 2 * 3
    states = [x.to(torch.bfloat16) for x in ours.stored(1)]
    for held, read, new in zip(states, ours.layer.states(), (ours.new_keys, ours.new_values)):
        assert torch.equal(held, torch.cat([read[1], new[1]]))
    for expand in (p.ALinear for p in (ours.attention.k_proj, ours.attention.v_proj)):
        expand.float()
    ours.dtype, ours.query = torch.float32, ours.query.float()
    plain = ours.unpacked(*(x[None] for x in ours.stored(1)), rows=slice(1, 2))[0]
    assert relative_error(plain, ours.exact(1)) < 1e-5
    assert relative_error(plain, ours.exact(0)) > 0.1


def test_the_prepared_step_is_the_step():
    ours = layer()
    assert torch.equal(ours.prepared()(), ours.attend())


def test_a_graph_owns_the_tensors_that_it_reads(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replaced = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: nullcontext(),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def made() -> tuple:
        states = torch.ones(3)
        return weakref.ref(states), in_a_graph(lambda: states + 1, "ours")

    states, (step, captured) = made()
    assert captured and torch.equal(step(), torch.full((3,), 2.0))
    assert states() is not None
    del step
    assert states() is None


@pytest.mark.gpu
def test_a_graph_gives_the_same_whatever_was_allocated_since():
    ours = layer(device="cuda", backend=None)
    expected = ours.attend()
    step, captured = in_a_graph(ours.prepared(), "ours")
    rubbish = [torch.full((2**size,), 0x7FC0, dtype=torch.int16, device="cuda") for size in range(4, 20) for _ in "ab"]
    assert captured and len(rubbish) == 32
    assert torch.equal(step(), expected)


def test_multiply_adds():
    """2 rows of 517 tokens, 4 query heads of 32 on 2 key/value heads, rank 16 for each head, and joint 32."""
    expand = 4 * 32 * 16
    assert layer().contender().macs == 2 * (517 * (2 * 16 * 32 + 4 * 32 + 4 * 16) + expand)
    assert layer({"head_group_size": 2}).contender().macs == 2 * (517 * (32 * 64 + 4 * 32 + 4 * 32) + 2 * expand)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.needs and "cpu" in peer.devices])
def test_peers_attend_to_the_dense_states(name):
    ours = layer()
    states = DenseStates(ours.config, 517, 2, torch.bfloat16, CPU, seed=3)
    peer = PEERS[name].make(states, ours)
    if name == "unpack":
        assert relative_error(peer.step()[1], ours.exact(1)) < 0.02
        return
    assert peer.nbytes == 2 * 2 * 2 * 517 * 32 * (4 if name.endswith("fp32") else 2)
    assert states.error(peer.step()) < 0.02
    assert states.error(peer.step().flip(1)) > 0.1


@pytest.mark.parametrize("scores", attention_peers.SCORES)
@pytest.mark.parametrize("sums", attention_peers.SUMS)
def test_every_code_by_hand_is_right(scores, sums, monkeypatch):
    """Each of them, chosen as if it were the fastest."""
    names = [*attention_peers.SCORES, *attention_peers.SUMS]
    # After the scores and the sums SDPA is tried, and what was chosen.
    times = iter([float(name not in (scores, sums)) for name in names] + [1.0, 0.0])
    monkeypatch.setattr(attention_peers, "least_seconds", lambda *args: next(times))
    ours = layer(batch=1)
    states = DenseStates(ours.config, 100, 2, torch.bfloat16, CPU)
    peer = attention_peers.by_hand(states, ours)
    assert peer.settings == {"scores": scores, "sums": sums}
    assert states.error(peer.step()) < 0.02


@pytest.mark.skipif(attention_peers.installed_version("llama-cpp-python") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize(("kind", "error"), [(Ggml.F16, 0.02), (Ggml.Q8_0, 0.02), (Ggml.Q4_0, 0.3)])
def test_llama_cpp_attends_to_the_dense_states(kind, error):
    ours = layer()
    states = DenseStates(ours.config, 512, 3, torch.bfloat16, CPU)
    peer = attention_peers.llama_cpp(states, ours, kind)
    assert states.error(peer.step()) < error
    assert states.error(peer.step().flip(1)) > 0.5


def test_what_does_not_fit_is_left_out_visibly(tmp_path, capsys):
    options = attention_options(memory_gib=1e-6, peers=["by hand", "flash", "llama.cpp f16"], ranks=[0.5])
    record = benchmark_attention.main(options)
    case = next(iter(record["cases"].values()))
    assert "would need" in case["peers"]["by hand"]["left_out"]
    assert case["peers"]["flash"]["left_out"] == "runs on cuda, not on cpu"
    assert case["seconds"]["p50"] > 0
    printed = capsys.readouterr().out
    assert "by hand: left out of 512 tokens x 1: would need" in printed
    assert "| by hand: would need" in results_tables.attention_full(record)


def test_only_steps_of_pytorch_wake_its_workers():
    woken = []
    options = attention_options(seconds=1e-9, threads=2)
    seconds_in_turns(options, {"ours": lambda: None, "peer": lambda: None}, woken.append, foreign=True)
    assert woken[:4] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [511]}, "lengths=511: must be at least 512"),
        ({"bits": []}, r"bits=\[\]: must name at least one"),
        ({"batches": [1, 0]}, "batches=0: must be above 0"),
        ({"peers": ["vLLM"]}, r"peers=\['vLLM'\]: must be among DynamicCache"),
    ],
)
def test_attention_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionBenchmarkConfig(**fields)


# ---- whole models


def test_decode_record_is_complete(decode_run):
    options, record = decode_run
    assert json.loads(Path(options.output).read_text()) == record
    assert list(record["cases"]) == ["random, 512 x 1", "random, 512 x 2", "random, prompt of 256"]
    for case in list(record["cases"].values())[:2]:
        assert case["fused"] == (case["backend"] != "reference")
        assert 0 < case["gate"]["ours"] <= 2 * case["gate"]["reference"]
        assert (case["ours"]["steps"], case["dense"]["steps"]) == (6, 2)
        for one in (case["ours"], case["dense"]):
            assert one["tokens_per_s"] == pytest.approx(case["batch"] / one["mean_s"])
            assert one["peak_memory"] is None or abs(one["peak_memory"]) < 2**28  # too small here to be seen
        assert case["speedup"] == case["ours"]["tokens_per_s"] / case["dense"]["tokens_per_s"]
        assert case["ours"]["cache_nbytes"] < case["dense"]["cache_nbytes"] == case["batch"] * 512 * 2 * 2 * 2 * 16 * 2
    first = record["cases"]["random, prompt of 256"]
    assert first["speedup"] == first["dense"]["seconds"]["p50"] / first["ours"]["seconds"]["p50"]
    assert first["gate"]["ratio"] <= 2


def test_decode_goes_on_where_it_stopped(decode_run, tmp_path, monkeypatch):
    options, record = decode_run
    output = tmp_path / "all.json"
    output.write_text(json.dumps(record))
    monkeypatch.setattr(benchmark_decode, "check", lambda subject: pytest.fail("nothing is left to measure"))
    assert benchmark_decode.main(replace(options, output=str(output))) == record
    with pytest.raises(ValueError, match=r"holds cases of other options \(bits\)"):
        benchmark_decode.main(replace(options, output=str(output), bits=4))


@pytest.mark.parametrize("wrong", [{"query": 1.2}, {"summed": 1.05}, {"summed": float("nan")}])
def test_the_gate_stops_wrong_models(wrong, tmp_path, monkeypatch):
    """The chosen back end is another than the one it is compared with; here only that one is wrong."""
    options = decode_options(output=str(tmp_path / "record.json"))
    assert benchmark_decode.check(Subject(options, "random"))["ratio"] == 1
    wrong_back_end(monkeypatch, Subject, wrong)
    with pytest.raises(RuntimeError, match=r"correctness gate: error .* of another in random is more than 2 times"):
        benchmark_decode.main(options)
    assert not (tmp_path / "record.json").exists()


def test_the_models_of_a_subject():
    """The dense model and the split one are of one shape, and the caches hold what is asked for."""
    subject = Subject(decode_options(), "random")
    assert subject.latent.dtype == subject.dense.dtype == torch.bfloat16
    assert subject.latent.model.rotary_emb.inv_freq.dtype == torch.float32
    packed, dense = subject.latent_cache(300, 2, "reference"), subject.dense_cache(300, 2)
    assert packed.row_tokens() == [300, 300] and dense.get_seq_length() == 300
    assert dense.layers[1].keys.shape == (2, 2, 300, 16)
    same = subject.latent_cache(300, 2, "reference")
    assert all(torch.equal(a, b) for a, b in zip(packed.layers[1].states(), same.layers[1].states()))


def test_a_dense_cache_that_does_not_fit_is_left_out_visibly(capsys):
    record = benchmark_decode.main(decode_options(memory_gib=1e-6, prompts=0))
    assert all("would need" in case["dense"]["left_out"] for case in record["cases"].values())
    assert "dense cache left out of 512 tokens x 2: would need" in capsys.readouterr().out
    assert "would need" in results_tables.decode(record)


def test_peak_memory_sees_an_allocation():
    before = benchmark_decode.peak_memory(CPU, reset=True)
    if before is None:
        pytest.skip("the system does not say")
    torch.ones(2**24)
    assert 0.98 * 2**26 <= benchmark_decode.peak_memory(CPU) - before < 2**27
    assert benchmark_decode.peak_memory(CPU, reset=True) - before < 2**25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 100, "dense_steps": 8}, "steps=100: must be a multiple of dense_steps=8"),
        ({"random": False}, "random=False: needs checkpoints"),
        ({"checkpoints": ["no/such/folder"]}, "model='no/such/folder'"),
        ({"memory_gib": 0}, "memory_gib=0: must be above 0"),
    ],
)
def test_decode_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DecodeBenchmarkConfig(**fields)


# ---- shapes of blocks


def test_blocks_record_is_complete(blocks_run):
    options, record = blocks_run
    assert json.loads(Path(options.output).read_text()) == record
    assert len(record["cases"]) == 2 * 2 * 2
    for subject, (name, case) in zip(options.subjects(), record["cases"].items(), strict=True):
        layers, heads, _ = subject.block
        assert name == f"{subject.label}, 256" and case["geometry"] == "small" and not case["whole"]
        assert case["gate"]["ratio"] == 1 and case["backend"] == "reference" and case["rounds"] == 2
        # The cache is as large as it is said to be, and with one channel more in each latent it would be too large.
        assert 0.11 < case["cache_share"] <= 0.125
        assert case["cache_nbytes"] == cache_nbytes(subject.config, 256, torch.bfloat16)
        more = {name: [rank + 1 for rank in ranks] for name, ranks in subject.config.truncation_ranks.items()}
        subject.config.truncation_ranks = more
        assert cache_nbytes(subject.config, 256, torch.bfloat16) > 0.125 * 2 * layers * 4 * 32 * 2 * 256
        # 4 key/value heads of 32 in every layer of the block, 8 query heads.
        groups = 4 if heads else 1
        keys, values = case["rank"] * 4 * 32, case["rank"] * 8
        assert case["rebuild_macs"] == keys + values
        factors = (2 * case["rank"] * 4 * 32 + case["rank"] * groups + 4 * 32) * 2 * 2 * layers
        assert case["factor_nbytes"] == factors
        ends = [case["dense"][a] / case["ours"][b] for a, b in (("p20", "p80"), ("p80", "p20"))]
        assert ends[0] <= case["speedup"]["p50"] <= ends[1]
        assert case["ours"]["p20"] <= case["ours"]["p50"] <= case["ours"]["p80"] and case["load"] >= 0
    table = results_tables.blocks(record)
    assert "small, a step of a layer:" in table and "| 2 layers, per head, keys + values |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_blocks_go_on_where_they_stopped(blocks_run, tmp_path, monkeypatch):
    options, record = blocks_run
    output = tmp_path / "all.json"
    output.write_text(json.dumps(record))
    monkeypatch.setattr(benchmark_blocks, "check", lambda subject: pytest.fail("nothing is left to measure"))
    assert benchmark_blocks.main(replace(options, output=str(output))) == record
    with pytest.raises(ValueError, match=r"holds cases of other options \(share\)"):
        benchmark_blocks.main(replace(options, output=str(output), share=0.2))


def test_the_times_of_a_whole_model_are_not_divided(blocks_run):
    _, record = blocks_run
    name = "small, 2 layers, all heads, keys and values, 256"
    seconds = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    case = record["cases"][name] | {"ours": seconds}
    of_layer, of_model = (
        benchmark_blocks.blocks_tables(record | {"cases": {name: case | {"whole": whole}}}) for whole in (False, True)
    )
    assert "a step of a layer" in of_layer and "| 1,000 [500–1,500] |" in of_layer
    assert "a step of the whole model" in of_model and "| 2,000 [1,000–3,000] |" in of_model


def test_copies_of_blocks_are_whole_caches():
    """Copied blocks stand where packed ones would, and the gate's exact cache holds what the packed one does."""
    subject = blocks_options(dtype="float32").subjects()[-1]
    cache = subject.latent_cache(1000, 1, None)
    (layer,) = cache.layers
    assert cache.row_tokens() == [1000] and cache.nbytes_used == cache_nbytes(subject.config, 1000, torch.float32)
    assert layer.pool.used == len(layer.rows[0].blocks) == 30
    states, period = layer.states()[0][0], 16 * 32
    assert torch.equal(states[: 14 * 32], states[period : 30 * 32])
    assert not torch.equal(states[:32], states[32:64])
    assert benchmark_blocks.check(subject)["ours"] < 1e-5


@pytest.mark.parametrize("wrong", [{"query": 1.2}, {"summed": 1.05}, {"summed": float("nan")}])
def test_the_gate_stops_wrong_blocks(wrong, tmp_path, monkeypatch):
    wrong_back_end(monkeypatch, BlockSubject, wrong)
    with pytest.raises(RuntimeError, match=r"correctness gate: error .* of another in small is more than 2 times"):
        benchmark_blocks.main(blocks_options(output=str(tmp_path / "record.json")))
    assert not (tmp_path / "record.json").exists()


def test_a_share_without_room_for_a_channel_is_refused():
    with pytest.raises(ValueError, match=r"share=0\.01: must hold one channel of each latent"):
        benchmark_blocks.main(blocks_options(share=0.01))
    with pytest.raises(ValueError, match="share=0: must be above 0"):
        blocks_options(share=0)


# ---- a stored prefix


def test_prefix_record_is_complete(tmp_path):
    output = tmp_path / "record.json"
    small = {"length": 192, "continuations": 2, "steps": 2, "rounds": 2, "threads": 1}
    record = benchmark_prefix.main(benchmark_prefix.PrefixBenchmarkConfig(**small, output=str(output)))
    assert json.loads(output.read_text()) == record
    ((name, figures),) = record["models"].items()
    assert name == "50% of ranks, 2 bit"
    assert list(figures["seconds"]) == ["computed", "dense", "loaded", "forked"]
    for spread in figures["seconds"].values():
        assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
    assert figures["times_faster"]["loaded"] == 1
    memory = figures["memory"]
    # The prefix and two forks share its blocks; caches that are loaded share nothing.
    assert figures["prefix_bytes"] < memory["forks"]["bytes"] < 1.5 * memory["caches"]["bytes"]
    assert memory["caches"]["bytes"] < memory["dense"]["bytes"]
    header, (row,) = benchmark_prefix.prefix_cells(record)
    assert len(header) == len(row) and row[0] == name


def test_a_prefix_that_is_loaded_wrong_has_no_figures(monkeypatch):
    load = benchmark_prefix.KIVILatentCache.load

    def wrong(path, model):
        cache = load(path, model=model)
        cache.crop(-1)
        return cache

    monkeypatch.setattr(benchmark_prefix.KIVILatentCache, "load", wrong)
    with pytest.raises(RuntimeError, match="correctness gate: loaded gives other logits"):
        benchmark_prefix.main(benchmark_prefix.PrefixBenchmarkConfig(length=192, rounds=1, threads=1))


# ---- tables


def test_tables_render(attention_run, decode_run):
    (_, attention), (_, decode) = attention_run, decode_run
    pivot = results_tables.attention(attention)
    assert "| tokens × rows | 512 × 1 | 1,024 × 1 |" in pivot
    assert "| 50% joint, 2 bit |" in pivot and "GB/s read" in pivot and "1 thread, bfloat16" in pivot
    full = results_tables.attention_full(attention).splitlines()
    rows = sum(1 + len(case["peers"]) for case in attention["cases"].values())
    assert len(full) == 2 + rows and len({line.count("|") for line in full}) == 1
    table = results_tables.decode(decode)
    assert "| random | 512 × 2 |" in table and "| random | 256 |" in table
    assert results_tables.decode_targets(attention, decode).count("not measured") == 10


def test_targets(attention_run, decode_run):
    (_, attention), (_, decode) = attention_run, decode_run
    case = next(iter(attention["cases"].values()))
    by_name = {}
    for length, group in ((4096, "per head"), (32768, "per head"), (32768, "joint"), (131072, "per head")):
        per_token = {4096: 1.0, 32768: 1.0, 131072: 1.2}[length]
        by_name[f"{length} x 1, rank 0.5 {group}, 2 bit"] = case | {
            "seconds_per_token": per_token,
            "int8_peak_share": 0.5,
            "append_share": 0.021,
            "dense_read_s": case["seconds"]["p50"],
            "peers": {"DynamicCache": {"speedup": 15.0}, "by hand": {"speedup": 0.99}, "llama.cpp f16": {"speedup": 3}},
        }
    models = {
        "a": {"model": "random", "length": 32768, "batch": 1, "speedup": 7.9},
        "b": {"model": "0.125", "length": 32768, "batch": 1, "speedup": 11.0},
        "c": {"model": "0.125", "length": 32768, "batch": 8, "speedup": 11.0},
    }
    lines = results_tables.decode_targets(attention | {"cases": by_name}, decode | {"cases": models}).splitlines()[2:]
    verdicts = [line.split("|")[-2].strip() for line in lines]
    assert verdicts == ["met", "", "", "missed", "met", "", "missed", "met", "met", "met", "missed", "missed"]


def test_cases_of_vllm_are_those_of_at_most_so_many_tokens():
    options = benchmark_vllm.VllmBenchmarkConfig(contexts=[1024, 4096], requests=[1, 32], most_tokens=32768)
    assert options.cases() == [(1024, 1), (1024, 32), (4096, 1)]
    with pytest.raises(ValueError, match=r"at_a_time=0: must be"):
        benchmark_vllm.VllmBenchmarkConfig(at_a_time=0)


def test_the_random_model_of_vllm_is_made_once(monkeypatch, tmp_path):
    """Half the channels of each head, with scales that hold what random tokens give."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(benchmark_vllm, "RANDOM", benchmark_vllm.RANDOM | small | {"head_dim": 16})
    folders = benchmark_vllm.random_models(tmp_path, [2])
    assert list(folders) == ["stock", "latent 2 bits"]
    model = ALRDLlamaForCausalLM.from_pretrained(folders["latent 2 bits"])
    projection, seen = model.model.layers[1].self_attn.v_proj, []
    assert projection.ALinear.ranks == (8, 8)
    projection.BLinear.register_forward_hook(lambda module, inputs, latents: seen.append(latents.float()))
    model(torch.randint(4096, (1, 256)), use_cache=False)
    low, step = projection.latent_zero_point, projection.latent_scale
    assert ((seen[0] > low - 2 * step) & (seen[0] < low + 5 * step)).all()
    monkeypatch.setattr(benchmark_vllm, "_random_latent", None)
    assert benchmark_vllm.random_models(tmp_path, [2]) == folders


def test_the_table_of_vllm():
    def engine(milliseconds: float) -> dict:
        step = {"p20": milliseconds / 1e3, "p50": milliseconds / 1e3, "p80": milliseconds / 1e3}
        return {"first_token_s": {"mean": 1.0, "most": 2.0}, "step_s": step, "peak_bytes": 2**30}

    engines = {"stock": engine(20), "latent": engine(10)}
    case = {"model": "random", "context": 1024, "requests": 8, "engines": engines, "load": 1.5}
    config = {"steps": 4, "at_a_time": 2, "eager": False, "dtype": "bfloat16"}
    config |= {"stock_block_size": 64, "block_size": 128}
    environment = {"vllm": "0.32.0", "cpu": "a processor", "threads": 2, "torch": "2.13"}
    table = results_tables.vllm({"cases": {"random": case}, "config": config, "environment": environment})
    assert "| random | 8 × 1,024 | stock | 1.0 / 2.0 | 20.0 [20.0–20.0] | 400 | 1.00× | 1 GiB |" in table
    assert "| latent | 1.0 / 2.0 | 10.0 [10.0–10.0] | 800 | 2.00× |" in table and "load 1.5 to 1.5" in table
