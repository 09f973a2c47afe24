"""Statistics on text: moments and Fisher information against a direct computation, interruptions, keys, clean-up."""

import json
from functools import partial

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from modules.fit import statistics
from modules.fit.statistics import collect_statistics, record_key, statistics_record
from tests.helpers import SMALL_LLAMA, TINY_LLAMA, randomize_vectors, tiny_dense

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of `collect_statistics`; five windows leave a last batch of one.
HOW = {"sample": 6, "sinks": 3, "batch_size": 2, "seed": 5}


def small_qwen2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fields = {**TINY_LLAMA, **SMALL_LLAMA}
        del fields["head_dim"]
        model = Qwen2ForCausalLM(Qwen2Config(**fields))
        randomize_vectors(model)
    return model.eval()


MODELS = {
    "gqa": lambda: tiny_dense(**SMALL_LLAMA),
    "mha": lambda: tiny_dense(**{**SMALL_LLAMA, "num_key_value_heads": 4}),
    "mqa, head size 10 of 8": lambda: tiny_dense(**{**SMALL_LLAMA, "num_key_value_heads": 1, "head_dim": 10}),
    "biases": lambda: tiny_dense(**SMALL_LLAMA, attention_bias=True),
    "qwen2": small_qwen2,
}


@pytest.fixture(scope="module")
def text():
    return torch.randint(1, 31, (5, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def collected(request, text):
    """A model and its statistics, Fisher information included."""
    model = request.param()
    return model, collect_statistics(model, text, **HOW)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A model, its statistics, their file, all from one pass that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_dense(**SMALL_LLAMA)
    found = collect_statistics(model, text, **HOW, folder=folder)
    (path,) = folder.glob("*.safetensors")
    return model, found, path


def close(found, expected, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


def projections(model):
    return [(i, p, getattr(a, p)) for i, a in enumerate(attentions(model)) for p in ("k_proj", "v_proj")]


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


@torch.no_grad()
def inputs_of(model, text) -> list[torch.Tensor]:
    """`[windows, T, C]` float64 inputs of each attention layer's projections."""
    seen = []
    hooks = [
        a.k_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
        for a in attentions(model)
    ]
    model(text)
    for hook in hooks:
        hook.remove()
    return seen


def tensors(found) -> list[torch.Tensor]:
    result = []
    for stats in found:
        for side in (stats.k_proj, stats.v_proj):
            result += [side.covariance, side.mean, side.sample] + ([] if side.fisher is None else [side.fisher])
        result.append(stats.query_covariance)
    return result


def same(found, expected) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return len(pairs) > 4 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# ---- what is measured


class TestMoments:
    def test_of_outputs_without_bias(self, collected, text):
        model, found = collected
        x = inputs_of(model, text)
        for i, p, linear in projections(model):
            stats = getattr(found[i], p)
            y = x[i] @ linear.weight.double().T
            flat = y[:, 3:].flatten(0, 1)
            assert close(stats.covariance, flat.T @ flat / 85)
            assert close(stats.mean, flat.mean(0))
            # Of the twelve places that a run of six has behind three sinks: 0, 0.618, 0.236, 0.854, 0.472 of the way.
            for window, start in enumerate((3, 10, 5, 13, 8)):
                assert close(stats.sample[window].double(), y[window, start : start + 6])
            assert stats.covariance.dtype == stats.mean.dtype == torch.float64 and stats.sample.dtype == torch.float32
        assert len(found) == 2

    def test_of_queries_with_bias(self, collected, text):
        model, found = collected
        for attention, x, stats in zip(attentions(model), inputs_of(model, text), found, strict=True):
            q = attention.q_proj.double()(x)[:, 3:].flatten(0, 1).unflatten(-1, (4, -1))
            attention.q_proj.float()
            assert close(stats.query_covariance, torch.einsum("thi,thj->hij", q, q) / 85)
            half = attention.head_dim // 2
            energy = (q[..., :half] ** 2 + q[..., half:] ** 2).mean(0)
            assert close(stats.query_energy, energy)
            assert stats.query_covariance.dtype == torch.float64

    def test_biases_would_be_noticed(self):
        for make in (MODELS["biases"], MODELS["qwen2"]):
            assert all(linear.bias.abs().max() > 0.1 for _, _, linear in projections(make()))

    def test_in_bfloat16(self, text):
        model = tiny_dense(**SMALL_LLAMA, dtype=torch.bfloat16)
        found = collect_statistics(model, text, **HOW)
        (stats,) = {(s.sample.dtype, s.mean.dtype, s.fisher.dtype) for f in found for s in (f.k_proj, f.v_proj)}
        assert stats == (torch.bfloat16, torch.float64, torch.float64)
        exact = collect_statistics(model.float(), text, **HOW)
        assert close(found[0].k_proj.covariance, exact[0].k_proj.covariance, 0.05)
        assert close(found[0].v_proj.fisher, exact[0].v_proj.fisher, 0.5)

    def test_all_tokens_may_be_sampled_or_none(self, text):
        model = tiny_dense(**SMALL_LLAMA)
        every = collect_statistics(model, text, fisher=False, sample=20, sinks=0)
        assert every[1].v_proj.sample.shape == (5, 20, 16)
        flat = every[1].v_proj.sample.flatten(0, 1).double()
        assert close(flat.T @ flat / 100, every[1].v_proj.covariance)
        assert collect_statistics(model, text, fisher=False, sample=0)[1].v_proj.sample.shape == (5, 0, 16)


class TestFisher:
    @staticmethod
    def by_hand(model, text, sinks):
        """Gradients of -log p of drawn tokens with respect to what is added to each output, squared and summed."""
        sums = {}
        for i, batch in enumerate(text.split(HOW["batch_size"])):
            added, hooks = {}, []
            for layer, p, linear in projections(model):
                zero = torch.zeros(*batch.shape, linear.out_features, requires_grad=True)
                added[layer, p] = zero
                hooks.append(linear.register_forward_hook(lambda module, inputs, output, zero=zero: output + zero))
            logits = model(batch).logits.flatten(0, 1)
            generator = torch.Generator().manual_seed(HOW["seed"] * 1_000_003 + i)
            shares = torch.rand(batch.numel(), 1, dtype=torch.float64, generator=generator)
            drawn = (logits.detach().double().softmax(-1).cumsum(-1) <= shares).sum(-1, keepdim=True)
            loss = -logits.log_softmax(-1).gather(1, drawn).sum()
            for key, g in zip(added, torch.autograd.grad(loss, list(added.values())), strict=True):
                g = g[:, sinks:].flatten(0, 1).double()
                sums[key] = sums.get(key, 0) + g.T @ g
            for hook in hooks:
                hook.remove()
        return {key: total / text[:, sinks:].numel() for key, total in sums.items()}

    def test_against_gradients(self, collected, text):
        model, found = collected
        expected = self.by_hand(model, text, sinks=3)
        other = self.by_hand(model, text, sinks=0)
        for (i, p), fisher in expected.items():
            assert close(getattr(found[i], p).fisher, fisher, 1e-4)
            assert not close(other[i, p], fisher, 0.01)

    def test_logits_of_a_few_tokens_at_a_time(self, whole, text, monkeypatch):
        model, found, _ = whole
        monkeypatch.setattr(statistics, "_LOGITS_TOKENS", 7)
        for mine, other in zip(tensors(collect_statistics(model, text, **HOW)), tensors(found), strict=True):
            assert close(mine, other, 1e-5)

    def test_draws_follow_the_distribution(self):
        """Each token gets its share of a million evenly spread numbers; one without probability is never drawn."""
        logits = torch.tensor([[1.0, -torch.inf, 0.5, -3.0, 2.0, -torch.inf]])
        shares = torch.arange(1_000_000, dtype=torch.float64) / 1_000_000
        drawn = statistics._drawn(logits.expand(len(shares), -1), shares).bincount(minlength=6)
        assert close(drawn / 1e6, logits.softmax(-1)[0], 1e-5) and drawn[1] == drawn[5] == 0

    def test_without_sinks(self, whole, text):
        model, _, _ = whole
        found = collect_statistics(model, text, **{**HOW, "sinks": 0})
        for (i, p), fisher in self.by_hand(model, text, sinks=0).items():
            assert close(getattr(found[i], p).fisher, fisher, 1e-4)

    def test_moments_do_not_depend_on_it(self, whole, text):
        model, found, _ = whole
        plain = collect_statistics(model, text, fisher=False, **HOW)
        for p in ("k_proj", "v_proj"):
            for mine, other in zip(found, plain, strict=True):
                assert getattr(other, p).fisher is None
                assert close(getattr(mine, p).covariance, getattr(other, p).covariance, 1e-6)
                assert close(getattr(mine, p).sample, getattr(other, p).sample, 1e-5)

    def test_draws_follow_the_seed_alone(self, whole, text):
        model, found, _ = whole
        torch.manual_seed(77)
        before = torch.get_rng_state()
        assert same(collect_statistics(model, text, **HOW), found)
        assert torch.equal(torch.get_rng_state(), before)
        other = collect_statistics(model, text, **{**HOW, "seed": 6})
        assert torch.equal(other[0].k_proj.covariance, found[0].k_proj.covariance)
        assert not close(other[0].k_proj.fisher, found[0].k_proj.fisher, 0.01)

    def test_under_no_grad_and_in_training_mode(self, whole, text):
        model, found, _ = whole
        model.train()
        try:
            with torch.no_grad():
                assert same(collect_statistics(model, text, **HOW), found)
            assert all(module.training for module in model.modules())
        finally:
            model.eval()

    def test_layers_are_recomputed_so_that_their_activations_need_not_be_held(self, whole, text):
        model, _, _ = whole
        calls = []
        hook = model.model.layers[0].input_layernorm.register_forward_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        collect_statistics(model, text, **HOW)
        forwards = len(calls)
        collect_statistics(model, text, fisher=False, **HOW)
        hook.remove()
        assert (forwards, len(calls) - forwards) == (6, 3) and calls[-3:] == [False] * 3


# ---- interruptions


class Stop(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """A function after whose call the n-th batch from now on raises, before or after it was run; n = 0: none does."""
    run = statistics._run
    ran = []

    def arrange(n: int, after: bool = False):
        ran.clear()

        def counted(model, batch, *rest):
            ran.append(batch)
            if len(ran) == n and not after:
                raise Stop
            run(model, batch, *rest)
            if len(ran) == n:
                raise Stop

        monkeypatch.setattr(statistics, "_run", counted)
        return ran

    return arrange


class TestResuming:
    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_gives_the_same_bits(self, whole, text, tmp_path, stop_at, done, after):
        model, expected, file = whole
        stop_at(done + 1, after)
        with pytest.raises(Stop):
            collect_statistics(model, text, **HOW, folder=tmp_path, save_seconds=0)
        assert (tmp_path / file.name).exists() == (done > 0)
        torch.manual_seed(123)
        ran = stop_at(0)
        assert same(collect_statistics(model, text, **HOW, folder=tmp_path), expected)
        assert len(ran) == 3 - done and torch.equal(ran[0], text[2 * done : 2 * done + 2])
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
        assert {f.name for f in tmp_path.iterdir()} == {file.name, file.with_suffix(".json").name}

    def test_again_and_again_without_fisher_information(self, whole, text, tmp_path, stop_at):
        model, _, _ = whole
        expected = collect_statistics(model, text, fisher=False, **HOW)
        for _ in range(2):
            stop_at(2)
            with pytest.raises(Stop):
                collect_statistics(model, text, fisher=False, **HOW, folder=tmp_path, save_seconds=0)
        ran = stop_at(0)
        assert same(collect_statistics(model, text, fisher=False, **HOW, folder=tmp_path), expected)
        assert len(ran) == 1

    def test_saves_are_so_far_apart(self, whole, text, tmp_path, stop_at):
        model, _, _ = whole
        stop_at(3)
        with pytest.raises(Stop):
            collect_statistics(model, text, **HOW, folder=tmp_path, save_seconds=60)
        assert list(tmp_path.iterdir()) == []

    def test_a_save_that_fails_leaves_the_last_one(self, whole, text, tmp_path, stop_at, monkeypatch):
        model, expected, file = whole
        stop_at(2)
        with pytest.raises(Stop):
            collect_statistics(model, text, **HOW, folder=tmp_path, save_seconds=0)
        kept = (tmp_path / file.name).read_bytes()
        stop_at(0)

        def fail(tensors, path, **_):
            path.write_bytes(b"half of it")
            raise OSError("disk full")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr("modules.files.save_file", fail)
            collect_statistics(model, text, **HOW, folder=tmp_path, save_seconds=0)
        assert (tmp_path / file.name).read_bytes() == kept
        assert not list(tmp_path.glob("*.part"))
        assert same(collect_statistics(model, text, **HOW, folder=tmp_path), expected)

    def test_a_finished_file_is_used_as_it_is(self, whole, text, stop_at):
        model, expected, file = whole
        before = (file.read_bytes(), file.stat().st_mtime_ns)
        ran = stop_at(1)
        assert same(collect_statistics(model, text, **HOW, folder=file.parent), expected)
        assert same(collect_statistics(model, text, **HOW, folder=str(file.parent)), expected)
        assert not ran and (file.read_bytes(), file.stat().st_mtime_ns) == before

    def test_nothing_is_written_without_a_folder(self, whole, text, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(statistics, "save_tensors", lambda *_: pytest.fail("written"))
        collect_statistics(whole[0], text, **HOW, save_seconds=0)
        assert list(tmp_path.iterdir()) == []

    def test_the_record_lies_beside_it(self, whole, text):
        model, _, file = whole
        record = json.loads(file.with_suffix(".json").read_text())
        about = record.pop("about")
        assert about == {} and record == statistics_record(model, text, True, **HOW) and file.stem == record_key(record)
        assert record["torch"] == torch.__version__ and record["shape"] == [5, 20]


# ---- the key


class TestKey:
    @staticmethod
    def key(model, text, **changed):
        return record_key(statistics_record(model, text, **{"fisher": True, **HOW, **changed}))

    def test_changes_with_all_that_matters(self, text):
        def model(change=None, **fields):
            made = tiny_dense(**{**SMALL_LLAMA, **fields})
            if change:
                change(made)
            return made

        def nudge(parameter):
            parameter.data.view(-1)[3] += 1e-6

        keys = {"nothing": self.key(model(), text)}
        assert self.key(model(), text.clone()) == keys["nothing"]
        for i, p, name in ((0, "self_attn", "k_proj"), (1, "self_attn", "o_proj"), (1, "mlp", "down_proj")):
            change = model(lambda m, i=i, p=p, name=name: nudge(getattr(getattr(m.model.layers[i], p), name).weight))
            keys[name] = self.key(change, text)
        keys["head"] = self.key(model(lambda m: nudge(m.lm_head.weight)), text)
        keys["norm"] = self.key(model(lambda m: nudge(m.model.norm.weight)), text)
        keys["bias"] = self.key(model(attention_bias=True), text)
        keys["other bias"] = self.key(
            model(lambda m: nudge(m.model.layers[0].self_attn.q_proj.bias), attention_bias=True), text
        )
        keys["type"] = self.key(model().bfloat16(), text)
        keys["wide"] = self.key(model().bfloat16().float(), text)
        for name, value in (("fisher", False), ("sample", 7), ("sinks", 2), ("batch_size", 3), ("seed", 6)):
            keys[name] = self.key(model(), text, **{name: value})
        token = text.clone()
        token[4, 19] = token[4, 19] % 30 + 1
        keys |= {"token": self.key(model(), token), "order": self.key(model(), text.flip(0))}
        keys |= {"length": self.key(model(), text[:, :19]), "windows": self.key(model(), text[:4])}
        keys["shape"] = self.key(model(), text.reshape(4, 25))
        assert len(set(keys.values())) == len(keys), keys
        assert all(len(k) == 16 and int(k, 16) >= 0 for k in keys.values())

    def test_versions_are_part_of_it(self, text, monkeypatch):
        model = tiny_dense(**SMALL_LLAMA)
        keys = {self.key(model, text)}
        for module, name in ((statistics.torch, "__version__"), (statistics.transformers, "__version__")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, "0.0")
                keys.add(self.key(model, text))
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "FILE_VERSION", -1)
            keys.add(self.key(model, text))
        assert len(keys) == 4

    @pytest.mark.parametrize(
        "field",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rms_norm_eps": 0.1},
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            {"hidden_act": "gelu"},
        ],
        ids=lambda field: next(iter(field)),
    )
    def test_changes_with_what_no_weight_shows(self, text, field):
        """The same weights, in another model."""
        one, other = tiny_dense(**SMALL_LLAMA), tiny_dense(**{**SMALL_LLAMA, **field})
        other.load_state_dict(one.state_dict())
        found = [collect_statistics(m, text, fisher=False, **HOW)[1].k_proj.covariance for m in (one, other)]
        assert not close(*found, 1e-3)
        assert self.key(one, text) != self.key(other, text)

    def test_is_the_same_elsewhere(self, whole, text, tmp_path):
        """Neither the folder of the statistics nor that of the model matters."""
        model, expected, file = whole
        model.save_pretrained(tmp_path / "model")
        again = type(model).from_pretrained(tmp_path / "model")
        again.requires_grad_(False)
        folder = tmp_path / "some" / "where"
        assert same(collect_statistics(again, text, **HOW, folder=folder), expected)
        assert {f.name for f in folder.iterdir()} == {f.name for f in file.parent.iterdir()}
        assert (folder / file.name).read_bytes() == file.read_bytes()


# ---- the model afterwards


def hooks_of(model) -> dict:
    names = [n for n in vars(model) if n.endswith("_hooks")]
    return {(m, n): list(getattr(module, n).items()) for m, module in model.named_modules() for n in names}


class TestTheModel:
    @pytest.mark.parametrize("fails", [False, True, "in the backward pass"])
    @pytest.mark.parametrize("fisher", [True, False])
    def test_is_as_it_was(self, text, fisher, fails, monkeypatch):
        model = tiny_dense(**SMALL_LLAMA, attention_bias=True)
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 3 > 0)
        kept = next(p for p in model.parameters() if p.requires_grad)
        kept.grad = torch.ones_like(kept)
        model.model.layers[0].train()
        user_calls = []
        model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: user_calls.append(1))

        def state():
            return (
                [(n, p.requires_grad, p.data_ptr(), p.grad is None) for n, p in model.named_parameters()],
                [(n, m.training, "forward" in vars(m)) for n, m in model.named_modules()],
                hooks_of(model),
            )

        before, weights = state(), {n: p.clone() for n, p in model.state_dict().items()}
        if fails is True:
            with pytest.raises(IndexError):
                collect_statistics(model, torch.cat([text, torch.full_like(text[:1], 31)]), fisher, **HOW)
        elif fails:
            if fisher:
                with monkeypatch.context() as patch, pytest.raises(Stop):
                    patch.setattr(torch.Tensor, "backward", lambda *_: (_ for _ in ()).throw(Stop()))
                    collect_statistics(model, text, **HOW)
        else:
            collect_statistics(model, text, fisher, **HOW)
            assert user_calls
        assert state() == before
        assert torch.equal(kept.grad, torch.ones_like(kept))
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_forward_of_the_layer_itself_survives(self, text, fails, stop_at):
        """As accelerate puts one there, for a model that is spread over devices."""
        model, calls = tiny_dense(**SMALL_LLAMA), []
        layer = model.model.layers[0]

        def counted(forward, *args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        layer.forward = own = partial(counted, layer.forward)
        stop_at(1 if fails else 0)
        if fails:
            with pytest.raises(Stop):
                collect_statistics(model, text, **HOW)
        else:
            collect_statistics(model, text, **HOW)
            assert len(calls) == 6
        assert vars(layer).get("forward") is own


# ---- refusals and damage


class TestRefusals:
    def test_too_short(self, tmp_path):
        model = tiny_dense(**SMALL_LLAMA)
        for shape in ((0, 20), (3, 0), (20,), (1, 2, 20)):
            with pytest.raises(ValueError, match=r"tokens: .* must be \[windows, T\] with at least one token"):
                collect_statistics(model, torch.ones(shape, dtype=torch.long), sample=0, sinks=0, folder=tmp_path)
        short = torch.ones(2, 19, dtype=torch.long)
        with pytest.raises(ValueError, match="windows of 19 must hold 4 sinks and 16 sampled tokens"):
            collect_statistics(model, short, sample=16, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="windows of 19 must hold 19 sinks and 1 sampled tokens"):
            collect_statistics(model, short, sample=0, sinks=19, folder=tmp_path)
        assert collect_statistics(model, short, fisher=False, sample=15)[0].k_proj.sample.shape == (2, 15, 16)

    @pytest.mark.parametrize("damage", ["truncated", "header", "empty", "not one"])
    def test_a_damaged_file_is_named(self, whole, text, tmp_path, damage):
        model, _, file = whole
        content = file.read_bytes()
        broken = {"truncated": content[:-100], "header": b"\xff" + content[1:], "empty": b"", "not one": b"text " * 99}
        (tmp_path / file.name).write_bytes(broken[damage])
        with pytest.raises(ValueError, match=file.name):
            collect_statistics(model, text, **HOW, folder=tmp_path)
        assert (tmp_path / file.name).read_bytes() == broken[damage]
