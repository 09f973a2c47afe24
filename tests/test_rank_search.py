"""Ranks as other projects search them: shares, gradients by finite differences, ASVD's scaling, weights put back."""

import itertools

import pytest
import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modules.fit import rank_search
from modules.fit.rank_search import (
    asvd_ranks,
    asvd_sensitivity,
    asvd_statistics,
    fisher_information,
    fisher_ranks,
    mean_absolute_inputs,
    perplexity,
    proportional_ranks,
    replaced_weight,
    uniform_ranks,
)
from modules.svd_linear import factor_groups
from tests.helpers import tiny_dense

#: One layer of two key/value heads of 4 channels: 128 weights to move one by one.
MINUTE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def grouped(model, head_group_size=None) -> ALRDLlamaConfig:
    return ALRDLlamaConfig.from_llama(model.config, head_group_size=head_group_size)


def total(ranks) -> int:
    return sum(map(sum, ranks.values()))


class TestProportional:
    def test_by_hand(self):
        assert proportional_ranks({"a": [3.0], "b": [1.0]}, 8, 0.5, 1) == {"a": [6], "b": [2]}
        # 100 : 1 of 12 channels would be 11.9; the full rank takes 8, what is left goes to the other.
        assert proportional_ranks({"a": [100.0], "b": [1.0]}, 8, 0.75, 1) == {"a": [8], "b": [4]}
        # Eight channels of 48 by 5.3 : 1.6 : 1.1 are rounded to the nearest.
        weights = {"a": [5.3], "b": [1.6], "c": [1.1]}
        assert proportional_ranks(weights, 16, 8 / 48, 1) == {"a": [5], "b": [2], "c": [1]}
        # A weight of nothing keeps the smallest rank.
        assert proportional_ranks({"a": [1.0, 0.0], "b": [1.0, 2.0]}, 16, 0.5, 2) == {"a": [8, 2], "b": [8, 14]}

    @pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.7, 1.0])
    @pytest.mark.parametrize(("full", "multiple"), [(64, 8), (60, 8), (32, 1)])
    def test_share_is_met_in_multiples(self, share, full, multiple):
        weights = {str(i): torch.rand(3).exp().tolist() for i in range(7)}
        ranks = proportional_ranks(weights, full, share, multiple)
        assert abs(total(ranks) - share * 21 * full) < multiple
        for rank in itertools.chain(*ranks.values()):
            assert multiple <= rank <= full and (rank % multiple == 0 or rank == full)

    def test_uniform_differs_by_a_multiple_at_most(self):
        config = grouped(tiny_dense(), 2)
        ranks = uniform_ranks(config, 0.4, 4)
        assert list(ranks) == [f"model.layers.{i}.self_attn.{p}" for i in range(3) for p in ("k_proj", "v_proj")]
        assert {r for groups in ranks.values() for r in groups} == {12, 16}
        assert abs(total(ranks) - 0.4 * 6 * 64) < 4
        assert uniform_ranks(config, 0.5, 4) == {name: [16, 16] for name in ranks}

    def test_refusals(self):
        with pytest.raises(ValueError, match="share=0"):
            proportional_ranks({"a": [1.0]}, 64, 0.0)
        with pytest.raises(ValueError, match=r"share=0\.1: must be at least 0\.1250"):
            proportional_ranks({"a": [1.0]}, 64, 0.1)
        with pytest.raises(ValueError, match="weights"):
            proportional_ranks({"a": [float("nan")]}, 64, 0.5)


class TestFisher:
    @staticmethod
    def expected(slopes):
        return [group.mean().item() for group in slopes.square().mean(0).sqrt().chunk(2)]

    def test_against_differences_and_gradients_of_each_text(self):
        model, text = tiny_dense(dtype=torch.float64, **MINUTE), torch.randint(1, 23, (2, 9))
        found = fisher_information(model, [text], grouped(model, 1))
        step = 3e-3  # the library's norms and losses are float32 even in a float64 model

        def loss(row):
            logits = model(row[None]).logits[0, :-1]
            return torch.nn.functional.cross_entropy(logits, row[1:])

        for name, information in found.items():
            parameter = model.get_parameter(f"{name}.weight")
            gradients = torch.stack([torch.autograd.grad(loss(row), parameter)[0] for row in text])
            assert information == pytest.approx(self.expected(gradients), rel=1e-5)
            weight, slopes = parameter.data, torch.zeros_like(gradients)
            for (i, row), j, k in itertools.product(enumerate(text), range(weight.shape[0]), range(weight.shape[1])):
                kept = weight[j, k].item()
                weight[j, k] = kept + step
                above = loss(row).item()
                weight[j, k] = kept - step
                slopes[i, j, k] = (above - loss(row).item()) / (2 * step)
                weight[j, k] = kept
            assert information == pytest.approx(self.expected(slopes), rel=2e-3)
            assert len({round(x, 9) for x in information}) == 2

    def test_batches_do_not_matter_and_the_model_is_not_touched(self):
        model, text = tiny_dense(), torch.randint(1, 97, (4, 12))
        model.requires_grad_(False)
        before = {name: p.clone() for name, p in model.named_parameters()}
        one, two = (fisher_information(model, text.split(n), grouped(model)) for n in (1, 3))
        assert one.keys() == two.keys() and all(one[n] == pytest.approx(two[n], rel=1e-6) for n in one)
        for name, parameter in model.named_parameters():
            assert parameter.grad is None and not parameter.requires_grad
            assert torch.equal(parameter, before[name])

    def test_ranks_follow_the_information(self):
        model = tiny_dense()
        config = grouped(model, 2)
        information = fisher_information(model, [torch.randint(1, 97, (2, 20))], config)
        ranks = fisher_ranks(information, config, 0.5, 1)
        assert total(ranks) == 0.5 * 6 * 64
        pairs = [(f, r) for n in ranks for f, r in zip(information[n], ranks[n])]
        inside = [(f, r) for f, r in pairs if 1 < r < 32]
        scale = sum(r for _, r in inside) / sum(f for f, _ in inside)
        assert len(inside) > 3 and all(abs(r - scale * f) <= 1 for f, r in inside)

    def test_no_text(self):
        with pytest.raises(ValueError, match="at least one text"):
            fisher_information(tiny_dense(), [], grouped(tiny_dense()))


class TestScaling:
    def test_mean_absolute_inputs(self):
        model, ids = tiny_dense(), torch.randint(1, 97, (3, 10))
        found = mean_absolute_inputs(model, ids.split(2))
        first = model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids)).flatten(0, 1)
        assert torch.allclose(found[0], first.abs().double().mean(0), rtol=1e-5)
        assert len(found) == 3 and not torch.allclose(found[1], found[2])

    def test_hooks_are_removed(self):
        model = tiny_dense()
        with pytest.raises(IndexError):
            mean_absolute_inputs(model, [torch.tensor([[1000]])])
        with pytest.raises(ValueError, match="at least one token"):
            mean_absolute_inputs(model, [])
        assert not any(layer.self_attn.k_proj._forward_pre_hooks for layer in model.model.layers)

    @pytest.mark.parametrize("alpha", [0.5, 1.0])
    def test_factors_are_those_of_the_scaled_weight(self, alpha):
        weight, inputs = torch.randn(24, 40).double(), torch.rand(40).double() * torch.logspace(-2, 1, 40)
        model = tiny_dense(hidden_size=40, num_hidden_layers=1, num_key_value_heads=2, head_dim=12).double()
        keys, values = model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj
        values.weight.data = weight
        hows = asvd_statistics(model, [inputs], alpha)[0]
        how = hows["v_proj"]
        own = keys.weight.detach() * (inputs**alpha + 1e-6)
        assert torch.allclose(hows["k_proj"]["covariance"], own @ own.T)
        for rank in (3, 11, 24):
            scale = inputs**alpha + 1e-6
            u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
            expected = (u[:, :rank] * s[:rank]) @ v[:rank] / scale
            (factors,) = factor_groups(weight, (rank,), **how)
            assert torch.allclose(factors.a @ factors.b, expected, atol=1e-5 * weight.abs().max().item())
        plain = torch.linalg.svd(weight, full_matrices=False)
        assert not torch.allclose(plain.U[:, :3] @ plain.U[:, :3].T @ weight, expected, atol=0.1)


class TestSensitivity:
    @pytest.fixture
    def setting(self):
        model, batches = tiny_dense(), torch.randint(1, 97, (3, 24)).split(2)
        return model, batches, grouped(model, 2), asvd_statistics(model, mean_absolute_inputs(model, batches))

    def test_one_projection_at_a_time(self, setting):
        model, batches, config, statistics = setting
        before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
        found = asvd_sensitivity(model, batches, config, statistics, (0.25, 0.5, 1.0), multiple=4)
        assert [list(by_rank) for by_rank in found.values()] == [[8, 16, 32]] * 6
        for name, parameter in model.named_parameters():
            assert before[name][0] == parameter.data_ptr() and torch.equal(before[name][1], parameter)
        base = perplexity(model, batches)
        assert all(by_rank[32] == pytest.approx(base, rel=1e-4) for by_rank in found.values())
        assert all(abs(by_rank[8] / base - 1) > 1e-3 for by_rank in found.values())

        linear, how = model.model.layers[1].self_attn.v_proj, statistics[1]["v_proj"]
        product = [f.a @ f.b for f in factor_groups(linear.weight.detach(), (16, 16), **how)]
        linear.weight.data = torch.cat(product).float()
        expected = perplexity(model, batches)
        assert found["model.layers.1.self_attn.v_proj"][16] == pytest.approx(expected, rel=1e-6)

    def test_perplexity_by_hand(self, setting):
        model, batches, *_ = setting
        losses = []
        for row in torch.cat(list(batches)):
            logs = model(row[None]).logits[0].double().log_softmax(-1)
            losses += [-logs[i, row[i + 1]] for i in range(len(row) - 1)]
        assert perplexity(model, batches) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)

    def test_weights_come_back_after_an_exception(self, setting, monkeypatch):
        model, batches, config, statistics = setting
        before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
        seen = []

        def fail(model, batches):
            seen.append(model.model.layers[0].self_attn.k_proj.weight.clone())
            raise KeyboardInterrupt

        monkeypatch.setattr(rank_search, "perplexity", fail)
        with pytest.raises(KeyboardInterrupt):
            asvd_sensitivity(model, batches, config, statistics)
        assert not torch.equal(seen[0], before["model.layers.0.self_attn.k_proj.weight"][1])
        for name, parameter in model.named_parameters():
            assert before[name][0] == parameter.data_ptr() and torch.equal(before[name][1], parameter)

    def test_replaced_weight_keeps_the_type(self):
        linear = torch.nn.Linear(4, 4).bfloat16()
        with replaced_weight(linear, torch.eye(4).double()):
            assert linear.weight.dtype == torch.bfloat16 and torch.equal(linear.weight.float(), torch.eye(4))


class TestThreshold:
    #: Perplexities of ranks 8 and 16; the full rank is 64.
    FOUND = {"a": {8: 30.0, 16: 11.0}, "b": {8: 12.0, 16: 10.5}}

    def config(self):
        return grouped(tiny_dense())

    def test_by_hand(self):
        # Thresholds 10.5, 11, 12, 30 leave ranks (64, 16), (16, 16), (16, 8), (8, 8) of 128 channels.
        for share, expected in ((1.0, (64, 64)), (0.7, (64, 16)), (0.4, (16, 16)), (0.2, (16, 8)), (0.125, (8, 8))):
            assert asvd_ranks(self.FOUND, self.config(), share) == {"a": [expected[0]], "b": [expected[1]]}
        with pytest.raises(ValueError, match=r"share=0\.12"):
            asvd_ranks(self.FOUND, self.config(), 0.12)

    def test_the_lowest_threshold_that_fits(self):
        config = self.config()
        for _ in range(20):
            noise = torch.rand(6, 7)
            found = {
                str(i): {8 * (j + 1): 20 - j + 6 * noise[i, j].item() for j in range(7)} for i in range(6)
            }  # not monotone in the rank
            for share in (0.2, 0.5, 0.8):
                fitting = []
                for threshold in [0.0, *(p for by_rank in found.values() for p in by_rank.values())]:
                    ranks = [min((r for r, p in f.items() if p <= threshold), default=64) for f in found.values()]
                    if sum(ranks) <= share * 6 * 64:
                        fitting.append((threshold, ranks))
                expected = min(fitting)[1]
                assert [r for (r,) in asvd_ranks(found, config, share).values()] == expected

    def test_every_group_gets_the_rank(self):
        config = grouped(tiny_dense(), 2)
        found = {"a": {8: 12.0, 16: 11.0}, "b": {8: 11.5, 16: 10.5}}
        assert asvd_ranks(found, config, 0.4) == {"a": [16, 16], "b": [8, 8]}
