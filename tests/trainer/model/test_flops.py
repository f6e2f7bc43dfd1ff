"""Counts by arithmetic against counted modules, published totals and torch's own counter."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from helpers import filled, random_config, small

from officina.kernels.attention import dense_mask
from officina.trainer.config import DecoderConfig, LoraConfig, NoAdapterConfig
from officina.trainer.model.build import build_transformer
from officina.trainer.model.flops import flops_per_token, mean_keys, parameter_count
from officina.trainer.model.lora import add_lora
from officina.trainer.model.peaks import PEAK_BF16_FLOPS, peak_bf16_flops
from officina.trainer.model.targets import trained_count


@pytest.mark.parametrize("seed", range(60))
def test_parameters_are_those_of_the_module(seed):
    config = random_config(random.Random(seed))
    names = {name: p.numel() for name, p in build_transformer(config).named_parameters()}
    counts = parameter_count(config)
    assert counts.total == sum(names.values())
    assert counts.embedding == names["embed.weight"] and counts.head == names.get("head.weight", 0)
    assert counts.non_embedding == counts.total - counts.embedding - counts.head


def model(vocab, layers, d, ffn, heads, kv, **switches):
    return DecoderConfig(vocab_size=vocab, n_layers=layers, d_model=d, d_ff=ffn, n_heads=heads, n_kv_heads=kv, **switches)


GEMMA = dict(mlp="geglu", norm_placement="sandwich", tie_embeddings=True)
PUBLISHED = {
    # Exact totals, as the files of the published weights have them.
    "Llama-3.1-8B": (model(128_256, 32, 4096, 14_336, 32, 8), 8_030_261_248),
    "Mistral-7B-v0.1": (model(32_000, 32, 4096, 14_336, 32, 8), 7_241_732_096),
    "Qwen2.5-7B": (model(152_064, 28, 3584, 18_944, 28, 4, qkv_bias=True), 7_615_616_512),
    "Qwen3-0.6B": (model(151_936, 28, 1024, 3072, 16, 8, head_dim=128, qk_norm="head", tie_embeddings=True), 596_049_920),
    "SmolLM3-3B": (model(128_256, 36, 2048, 11_008, 16, 4, tie_embeddings=True), 3_075_098_624),
    "OLMo-2-7B": (model(100_352, 32, 4096, 11_008, 32, 32, qk_norm="full", norm_placement="post"), 7_298_617_344),
    "Gemma-2-9B": (model(256_000, 42, 3584, 14_336, 16, 8, head_dim=256, **GEMMA), 9_241_705_984),
    "Gemma-3-1B": (model(262_144, 26, 1152, 6912, 4, 1, head_dim=256, qk_norm="head", **GEMMA), 999_885_952),
    # Totals as the model cards round them.
    "EuroLLM-1.7B": (model(128_000, 24, 2048, 5632, 16, 8), 1.657e9),
    "EuroLLM-9B": (model(128_000, 42, 4096, 12_288, 32, 8), 9.154e9),
    "Teuken-7B": (model(250_680, 32, 4096, 13_440, 32, 2, tie_embeddings=True), 7.45e9),
    "Apertus-8B": (model(131_072, 32, 4096, 21_504, 32, 8, mlp="xielu", qk_norm="head"), 8.05e9),
    "Salamandra-7B": (model(256_000, 32, 4096, 11_008, 32, 8), 7.768e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    config, total = PUBLISHED[name]
    counted = parameter_count(config).total
    assert counted == total if isinstance(total, int) else abs(counted / total - 1) < 1e-3, f"{counted:,}"


@pytest.mark.parametrize("seed", range(12))
def test_flops_are_those_that_torch_counts(seed):
    """Forward and backward on the reference path, which computes every pair of query and key: the full convention."""
    drawn = random_config(random.Random(seed))
    config = DecoderConfig(**{**{k: getattr(drawn, k) for k in drawn.__dataclass_fields__}, "window": 0,
                              "local_rope": None, "attention_impl": "reference"})
    module, tokens = filled(config), torch.randint(0, 37, (2, 12))
    with FlopCounterMode(display=False) as counter:
        module(tokens, labels_BT=tokens).backward()
    assert counter.get_total_flops() == flops_per_token(config, 12, causal=False) * tokens.numel()


@pytest.mark.parametrize("seq_len,window", [(1, 0), (7, 0), (7, 1), (7, 3), (7, 7), (7, 100)])
def test_keys_are_those_that_the_mask_lets_through(seq_len, window):
    mask = dense_mask(seq_len, seq_len, True, window, None, torch.device("cpu"))
    assert mean_keys(seq_len, window, causal=True) * seq_len == pytest.approx(mask.sum().item())
    assert mean_keys(seq_len, window, causal=False) == min(seq_len, window or seq_len)


def test_windows_are_counted_by_layer():
    every, half = small(n_layers=4, window=3), small(n_layers=4, window=3, window_pattern=[True, False])
    none = small(n_layers=4)
    for causal in (True, False):
        low, middle, high = (flops_per_token(c, 64, causal=causal) for c in (every, half, none))
        assert low < middle < high and middle == pytest.approx((low + high) / 2)


def test_both_conventions_of_a_known_model():
    """6 P + 12 L D T of the Llama-3.1-8B at 8,192 tokens; P without the embedding, which is no product."""
    config = PUBLISHED["Llama-3.1-8B"][0]
    matrices = parameter_count(config).total - 128_256 * 4096 - (2 * 32 + 1) * 4096
    assert flops_per_token(config, 8192, causal=False) == 6 * matrices + 12 * 32 * 4096 * 8192
    assert flops_per_token(config, 8192, causal=True) == 6 * matrices + 12 * 32 * 4096 * 8193 / 2


def test_counting_needs_no_torch():
    code = "import sys, officina.trainer.model.flops, officina.trainer.model.peaks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peaks_are_exact_names_and_nothing_is_guessed():
    assert peak_bf16_flops("NVIDIA H200") == 989.4e12 and peak_bf16_flops("AMD Instinct MI250X") == 191.5e12
    assert peak_bf16_flops("NVIDIA A100-SXM-64GB") == 312e12
    for unknown in ("NVIDIA H20", "NVIDIA H200 ", "nvidia h200", "H200", "NVIDIA B300", "", "cpu"):
        assert peak_bf16_flops(unknown) is None
    assert all(1e14 < peak < 2e15 for peak in PEAK_BF16_FLOPS.values())


@pytest.mark.parametrize("seed", range(6))
def test_flops_with_adapters_are_those_that_torch_counts(seed):
    """The embedding is trained in full here, so that the first block's inputs need a gradient like all others."""
    drawn = random_config(random.Random(seed))
    config = DecoderConfig(**{**{k: getattr(drawn, k) for k in drawn.__dataclass_fields__}, "window": 0,
                              "local_rope": None, "attention_impl": "reference"})
    adapter = LoraConfig(rank=2, targets=["attn.q", "mlp.up"], train=["embed", *(["head"] if seed % 2 == 0 else [])][:1 + (
        not config.tie_embeddings)])
    module, tokens = filled(config), torch.randint(0, 37, (2, 12))
    chosen = add_lora(module, config, adapter)
    assert trained_count(config, adapter) == tuple(
        sum(p.numel() for p in module.parameters() if p.requires_grad or not only) for only in (True, False))
    assert chosen.linears
    with FlopCounterMode(display=False) as counter:
        module(tokens, labels_BT=tokens).backward()
    counted = flops_per_token(config, 12, causal=False, adapter=adapter)
    assert counter.get_total_flops() == counted * tokens.numel() < flops_per_token(config, 12, causal=False) * tokens.numel()


def test_an_adapter_costs_about_four_flops_a_frozen_parameter():
    config = PUBLISHED["Llama-3.1-8B"][0]
    whole, lora = (flops_per_token(config, 4096, causal=True, adapter=a) for a in (NoAdapterConfig(), LoraConfig(rank=16)))
    assert 0.66 < lora / whole < 0.72
    assert trained_count(config, LoraConfig(rank=16))[0] == 41_943_040  # as PEFT prints for r16 on all projections
