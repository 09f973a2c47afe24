"""What factors minimise: metrics against brute force, KL divergence to second order, and the measured rates."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from configuration_alrd_llama import ALRDLlamaConfig
from modules.fit import objectives
from modules.fit.objectives import OBJECTIVES, _noise, probe_rates, projection_factors, rope_key_metric
from modules.fit.statistics import collect_statistics
from modules.svd_linear import factor_groups, query_key_metric, value_output_metric
from tests.helpers import SMALL_LLAMA, tiny_dense

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def measured():
    """A model, a text and its statistics."""
    model, text = tiny_dense(**SMALL_LLAMA), torch.randint(1, 31, (24, 24), generator=torch.Generator().manual_seed(3))
    return model, text, collect_statistics(model, text, sample=16, sinks=0, batch_size=8)


def config_of(model, **fields) -> ALRDLlamaConfig:
    return ALRDLlamaConfig.from_llama(model.config, **fields)


# ---- the metric of keys with RoPE


class TestRopeKeyMetric:
    @pytest.mark.parametrize("first", [0, 13])
    def test_is_the_logit_error_over_the_offsets(self, first):
        heads, key_heads, size, longest = 6, 2, 8, 700
        config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=size)
        rotary = LlamaRotaryEmbedding(config).double()
        # Queries with a mean: whether keys lag behind or lead makes a difference.
        queries = torch.randn(40, heads, size).double() * torch.rand(heads, size) + torch.randn(heads, size)
        metric = rope_key_metric(
            torch.einsum("nhi,nhj->hij", queries, queries) / 40, key_heads, rotary.inv_freq, longest
        )
        assert metric.shape == (16, 16) and metric.dtype == torch.float64
        assert (metric[:8, 8:] == 0).all() and (metric[8:, :8] == 0).all()
        error = torch.randn(key_heads, size).double()

        def rotated(states, position):
            cos, sin = rotary(states, torch.tensor([[position]]))
            return apply_rotary_pos_emb(states[None, :, None], states[None, :, None], cos, sin)[0][0, :, 0]

        key, total = rotated(error, first).repeat_interleave(heads // key_heads, 0), 0.0
        offsets = [round(longest ** (i / 255)) for i in range(256)]
        for offset in offsets:
            query = rotated(queries.flatten(0, 1), first + offset).view(40, heads, size)
            total += torch.einsum("nhd,hd->nh", query, key).square().sum(1).mean().item() / 256
        assert (error.flatten() @ metric @ error.flatten()).item() == pytest.approx(total, rel=1e-4)
        opposite = rope_key_metric(
            torch.einsum("nhi,nhj->hij", queries, queries) / 40, key_heads, -rotary.inv_freq, longest
        )
        assert (error.flatten() @ opposite @ error.flatten()).item() != pytest.approx(total, rel=0.01)

    def test_tends_to_the_diagonal_one_where_all_frequencies_turn_often(self, monkeypatch):
        monkeypatch.setattr(objectives, "_OFFSETS", 4000)
        queries = torch.randn(30, 4, 8).double() + torch.randn(4, 8)
        covariance = torch.einsum("nhi,nhj->hij", queries, queries) / 30
        energy = (queries[..., :4] ** 2 + queries[..., 4:] ** 2).mean(0)
        # The square of a cosine averages to one half.
        limit = torch.diag(query_key_metric(energy, 2)) / 2
        fast = rope_key_metric(covariance, 2, torch.tensor([0.8, 1.3, 1.9, 2.6]), 10**9)
        slow = rope_key_metric(covariance, 2, torch.tensor([0.8, 1.3, 1.9, 1e-6]), 10**3)
        assert (fast - limit).abs().max() < 0.1 * limit.max()
        # A pair that does not turn keeps its own covariance.
        own, pair = covariance[:2].sum(0), torch.tensor([3, 7])
        assert torch.allclose(slow[pair][:, pair], own[pair][:, pair], atol=0.01)
        assert (slow - limit)[pair][:, pair].abs().max() > 0.1

    def test_is_symmetric_and_counts_every_query_head(self):
        queries = torch.randn(30, 4, 8).double()
        covariance = torch.einsum("nhi,nhj->hij", queries, queries) / 30
        angles = torch.tensor([1.0, 0.1, 0.01, 1e-4])
        both = rope_key_metric(covariance, 2, angles, 100)
        assert torch.allclose(both, both.T) and torch.linalg.eigvalsh(both).min() > -1e-9
        each = [rope_key_metric(covariance[[h]], 1, angles, 100) for h in range(4)]
        assert torch.allclose(both, torch.block_diag(each[0] + each[1], each[2] + each[3]))
        assert both.trace().item() == pytest.approx(covariance.diagonal(dim1=1, dim2=2).sum().item())


# ---- objectives


class TestObjectives:
    @pytest.mark.parametrize("layer", [0, 1])
    def test_give_the_metrics_that_they_say(self, measured, layer):
        model, _, found = measured
        stats = found[layer]
        how = {name: objective(model, layer, stats) for name, objective in OBJECTIVES.items()}
        assert list(how) == ["weight", "input", "query_output", "query_output_rope", "fisher"]
        assert how["weight"] == {"k_proj": {}, "v_proj": {}}
        o_weight = model.model.layers[layer].self_attn.o_proj.weight.detach()
        inv_freq = model.model.rotary_emb.inv_freq
        metrics = {
            "input": (None, None),
            "query_output": (query_key_metric(stats.query_energy, 2), value_output_metric(o_weight, 4, 2)),
            "query_output_rope": (
                rope_key_metric(stats.query_covariance, 2, inv_freq, 2048),
                value_output_metric(o_weight, 4, 2),
            ),
            "fisher": (stats.k_proj.fisher / 2, stats.v_proj.fisher / 2),
        }
        for name, expected in metrics.items():
            for p, metric in zip(("k_proj", "v_proj"), expected):
                assert torch.equal(how[name][p]["covariance"], getattr(stats, p).covariance)
                assert set(how[name][p]) == {"covariance"} | ({"metric"} if metric is not None else set())
                assert metric is None or torch.equal(how[name][p]["metric"], metric)

    def test_long_contexts_are_cut_to_8192(self, measured):
        _, _, found = measured
        model = tiny_dense(**SMALL_LLAMA, max_position_embeddings=100_000)
        how = OBJECTIVES["query_output_rope"](model, 0, found[0])["k_proj"]["metric"]
        inv_freq = model.model.rotary_emb.inv_freq
        expected, other = (rope_key_metric(found[0].query_covariance, 2, inv_freq, n) for n in (8192, 100_000))
        assert torch.equal(how, expected) and not torch.equal(how, other)


class TestProjectionFactors:
    @pytest.mark.parametrize("head_group_size", [None, 1])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_of_every_head_group(self, measured, objective, head_group_size):
        model, _, found = measured
        config = config_of(model, head_group_size=head_group_size)
        factors = projection_factors(model, config, found, objective)
        assert list(factors) == [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("k_proj", "v_proj")]
        for name, groups in factors.items():
            i, p = int(name.split(".")[2]), name[-6:]
            weight = model.get_submodule(name).weight.detach().double()
            how = OBJECTIVES[objective](model, i, found[i])[p]
            expected = factor_groups(weight, (16,) if head_group_size is None else (8, 8), **how)
            assert len(groups) == len(expected)
            for f, e in zip(groups, expected, strict=True):
                assert torch.allclose(f.energy, e.energy) and torch.allclose(f.a @ f.b, e.a @ e.b)
            assert torch.allclose(torch.cat([f.a @ f.b for f in groups]), weight, atol=1e-6)
        if objective == "weight":
            plain = projection_factors(model, config, None, "weight")
            assert all(torch.equal(f.a, g.a) for n in plain for f, g in zip(plain[n], factors[n]))

    @pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True), (False, False)])
    def test_mean_is_split_off_where_it_is_asked_for(self, measured, sides):
        model, _, found = measured
        config = config_of(model, k_mean_split=sides[0], v_mean_split=sides[1], head_group_size=1)
        for name, groups in projection_factors(model, config, found, "fisher").items():
            mean = getattr(found[int(name.split(".")[2])], name[-6:]).mean.chunk(2)
            split = sides[name[-6:] == "v_proj"]
            for f, mu in zip(groups, mean, strict=True):
                share = (f.project @ mu).abs()
                assert (share[1:].max() < 1e-10 * share[0]) == split

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_singular_statistics(self, objective):
        """Fewer tokens than channels, one of them of no energy."""
        model = tiny_dense(**SMALL_LLAMA)
        model.model.layers[0].self_attn.k_proj.weight.data[5] = 0
        found = collect_statistics(model, torch.tensor([[3, 4, 5]]), sample=1, sinks=1)
        assert torch.linalg.matrix_rank(found[0].v_proj.covariance) <= 3
        config = config_of(model, k_mean_split=True, v_mean_split=True)
        for name, (f,) in projection_factors(model, config, found, objective).items():
            assert torch.allclose(f.a @ f.b, model.get_submodule(name).weight.double(), atol=1e-6)
            assert torch.isfinite(f.energy).all() and (f.energy >= 0).all()

    def test_refusals(self, measured):
        model, text, found = measured
        for objective in ("input", "query_output", "query_output_rope", "fisher"):
            with pytest.raises(ValueError, match=f"objective='{objective}': needs the statistics of a text"):
                projection_factors(model, config_of(model), None, objective)
        with pytest.raises(ValueError, match="objective='palu'"):
            projection_factors(model, config_of(model), found, "palu")
        without = collect_statistics(model, text[:2], fisher=False, sample=1)
        with pytest.raises(ValueError, match=r"objective='fisher': needs statistics .* fisher=True"):
            projection_factors(model, config_of(model), without, "fisher")


# ---- what an error costs


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"])
@torch.no_grad()
def test_fisher_information_predicts_the_divergence(name):
    """An error of one token's keys or values costs ½ δᵀFδ, averaged over the tokens that may have it."""
    fields = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    model = tiny_dense(**{**SMALL_LLAMA, **fields}, dtype=torch.float64)
    window = torch.randint(1, 11, (1, 8))
    # The same window over and over: only the drawn tokens differ.
    found = collect_statistics(model, window.expand(1500, 8), sample=0, sinks=2, batch_size=500)
    fisher = getattr(found[int(name.split(".")[2])], name[-6:]).fisher
    module, reference = model.get_submodule(name), model(window).logits.log_softmax(-1)
    directions = torch.linalg.eigh(fisher).eigenvectors.T[[-1, -2]]
    for delta in (*directions, torch.randn(fisher.shape[0]).double()):
        delta = 2e-2 * delta / delta.norm()
        total = 0.0
        for token in range(2, 8):
            for sign in (1, -1):
                shift = torch.zeros(8, len(delta)).double()
                shift[token] = sign * delta
                hook = module.register_forward_hook(lambda module, inputs, output, shift=shift: output + shift)
                other = model(window).logits.log_softmax(-1)
                hook.remove()
                total += (reference.exp() * (reference - other)).sum().item() / 2
        assert total / 6 == pytest.approx((delta @ fisher @ delta).item() / 2, rel=0.15)


def test_noise_is_water_filling():
    variance = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.0, 3.0]).double()
    for level in (1e-6, 0.05, 0.3, 0.9, 1.0):
        noise = _noise(variance, level).square()
        assert noise.sum().item() == pytest.approx(level * 16.5, rel=1e-9)
        water = noise.max()
        assert torch.allclose(noise, variance.clamp(max=water.item()))
    # By hand: 0.5, and the same 1 for the four others.
    assert _noise(variance, 4.5 / 16.5).square().tolist() == pytest.approx([1, 1, 1, 0.5, 0, 1])
    assert _noise(torch.zeros(4), 0.1).tolist() == [0] * 4


@pytest.fixture(scope="module")
def setting(measured):
    model, text, found = measured
    factors = projection_factors(model, config_of(model, head_group_size=1), found, "fisher")
    variances = {}
    for name, groups in factors.items():
        samples = getattr(found[int(name.split(".")[2])], name[-6:]).sample.double().chunk(2, dim=-1)
        variances[name] = [(y @ f.project.T).flatten(0, 1).var(0) for f, y in zip(groups, samples, strict=True)]
    return model, factors, variances, text[:4]


@pytest.fixture(scope="module")
def rates(setting):
    return probe_rates(*setting)


class TestProbe:
    def test_are_divergences_per_unit_of_energy(self, setting, rates):
        model, factors, variances, text = setting
        reference = model(text).logits.double().log_softmax(-1)
        for name, groups in factors.items():
            stds, generator = [_noise(v, 0.05) for v in variances[name]], torch.Generator().manual_seed(0)
            energy = sum(f.unit * (s**2).sum().item() for f, s in zip(groups, stds, strict=True))
            divergences = []
            for i, window in enumerate(text):
                noise = torch.cat(
                    [(torch.randn(1, 24, 8, generator=generator).double() * s) @ f.a.T for f, s in zip(groups, stds)],
                    dim=-1,
                )
                noise[:, :4] = 0
                hook = model.get_submodule(name).register_forward_hook(lambda m, x, y, noise=noise: y + noise.float())
                logs = model(window[None]).logits[0].double().log_softmax(-1)
                hook.remove()
                divergences.append((reference[i].exp() * (reference[i] - logs)).sum(-1)[6:].mean())
            assert rates[name] == pytest.approx(torch.stack(divergences).mean().item() / energy, rel=1e-3)

    def test_are_about_one_where_the_energy_is_the_divergence(self, setting):
        """Small errors and a metric of the same text; the first quarter, not scored, is spoilt too."""
        model, factors, variances, text = setting
        rates = probe_rates(model, factors, variances, text, level=1e-4)
        assert all(0.3 < rate < 3 for rate in rates.values())

    def test_are_deterministic_and_leave_the_model_alone(self, setting, rates):
        model = setting[0]
        before = {n: p.clone() for n, p in model.state_dict().items()}
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert probe_rates(*setting) == rates and list(rates) == list(setting[1])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
        other = probe_rates(*setting, seed=1)
        assert all(other[n] != rates[n] for n in rates)

    def test_resume_from_what_is_known(self, setting, rates):
        calls = []
        for count in (0, 1, 3, 4):
            known = dict(list(rates.items())[:count])
            calls.clear()
            assert probe_rates(*setting, known=known, on_result=lambda r: calls.append(dict(r))) == rates
            assert len(known) == count and len(calls) == 4 - count
            assert all(calls[i].items() <= rates.items() and len(calls[i]) == count + i + 1 for i in range(4 - count))
        model, factors, variances, text = setting
        foreign = {next(iter(rates)): 123.0}
        assert probe_rates(model, factors, variances, text, known=foreign) == rates | foreign

    def test_an_exception_leaves_no_hook(self, setting):
        model, *rest = setting

        def fail(found):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            probe_rates(model, *rest, on_result=fail)
        broken = {n: [f._replace(a=f.a[:3]) for f in groups] for n, groups in rest[0].items()}
        with pytest.raises(RuntimeError):
            probe_rates(model, broken, rest[1], rest[2])
        assert not any(module._forward_hooks for module in model.modules())

    def test_what_does_not_vary_costs_nothing(self, setting, rates):
        model, factors, variances, text = setting
        names = list(factors)
        still = {**variances, names[1]: [torch.zeros_like(v) for v in variances[names[1]]]}
        found = probe_rates(model, factors, still, text)
        assert found == {**rates, names[1]: 0.0} and rates[names[1]] > 0
        # One group of two: the error is the other's alone.
        half = {**variances, names[0]: [variances[names[0]][0], torch.zeros_like(variances[names[0]][1])]}
        assert 0 < probe_rates(model, factors, half, text)[names[0]] != rates[names[0]]
