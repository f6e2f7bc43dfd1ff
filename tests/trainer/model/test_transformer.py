"""What every combination of switches must do: documents, cache, masters, zero labels, meta construction."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent))
from helpers import filled, random_config, small

from officina.kernels import attention as kernel
from officina.trainer.batch import IGNORE
from officina.trainer.config import RopeConfig, RunConfig, SingleConfig
from officina.trainer.model.build import build_transformer
from officina.trainer.model.layers import RMSNorm, Vocabulary
from officina.trainer.model.rope import rope_frequencies
from officina.trainer.parallel.blocks import prepare_blocks

CONFIGS = [random_config(random.Random(seed)) for seed in range(14)]
IDS = range(len(CONFIGS))


def packed(lengths, T):
    """documents and positions (1, T) of one row."""
    documents, positions = [], []
    for number, length in enumerate(lengths):
        documents += [number] * length
        positions += range(length)
    return torch.tensor([documents[:T]], dtype=torch.int32), torch.tensor([positions[:T]])


@pytest.mark.parametrize("index", IDS)
def test_packed_documents_give_the_logits_of_separate_ones(index):
    module = filled(CONFIGS[index], dtype=torch.float64)  # finer than fp32: only a real leak is seen
    tokens = torch.randint(0, 37, (1, 20))
    documents, positions = packed([7, 1, 12], 20)
    with torch.no_grad():
        got = module(tokens, documents_BT=documents, positions_BT=positions)
        want = torch.cat([module(part) for part in tokens.split([7, 1, 12], dim=1)], dim=1)
        unmasked = module(tokens)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert (unmasked - want).abs().max() > 1e-3  # without the mask it would show


@pytest.mark.parametrize("index", IDS)
def test_cached_decoding_gives_the_logits_of_the_full_forward(index):
    module = filled(CONFIGS[index], dtype=torch.float64)
    tokens = torch.randint(0, 37, (2, 20))
    cache = module.new_cache()
    with torch.no_grad():
        want = module(tokens)
        parts = [module(part, cache=cache) for part in tokens.split([6, 1, 1, 4, 1, 1, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-9, rtol=1e-9)
    assert cache.length == 20


def test_a_windowed_cache_holds_the_window_only():
    module = filled(small(window=5, window_pattern=[True, False]))
    cache = module.new_cache()
    for _ in range(30):
        module(torch.randint(0, 61, (1, 1)), cache=cache)
    assert [layer.length for layer in cache.layers] == [4, 30, 4]


@pytest.mark.parametrize("index", IDS)
def test_without_labels_every_parameter_gets_a_zero_gradient(index):
    module = filled(CONFIGS[index])
    tokens = torch.randint(0, 37, (2, 9))
    loss = module(tokens, labels_BT=torch.full_like(tokens, IGNORE), z_loss=1e-3)[0]
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("index", IDS)
def test_bf16_over_fp32_masters_is_the_bf16_module(index):
    """Casting each weight at its use gives what weights handed over in bf16 (FSDP2's policy) give, bit for bit."""
    master, low = filled(CONFIGS[index]), filled(CONFIGS[index], dtype=torch.bfloat16)
    master.compute_dtype = torch.bfloat16
    tokens = torch.randint(0, 37, (2, 16))
    losses = [m(tokens, labels_BT=tokens) for m in (master, low)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    embedding = "embed.weight"  # summed in fp32 over the masters, in bf16 over bf16 weights
    for (name, a), b in zip(master.named_parameters(), low.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        if name != embedding:
            assert torch.equal(a.grad, b.grad.float()), name


def test_bf16_activations_stay_bf16():
    module = filled(small(embed_scale=3.3, qk_norm="head", mlp="xielu", norm_cast="after"))
    module.compute_dtype = torch.bfloat16
    seen = []
    for block in module.blocks:
        block.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    assert module(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_weight", ["plain", "zero_centred"])
@pytest.mark.parametrize("norm_cast", ["before", "after"])
def test_norm_conventions(norm_weight, norm_cast, dtype):
    norm = RMSNorm(16, small(norm_weight=norm_weight, norm_cast=norm_cast, norm_eps=1e-3))
    x = (torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    weight = norm.weight.detach().to(dtype)
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    if norm_cast == "before":  # Llama: the product is one of the narrow dtype
        want = exact.to(dtype) * (1 + weight if norm_weight == "zero_centred" else weight)
    else:  # Gemma, OLMo 2: the product is fp32, rounded once
        want = (exact * (1 + weight.float() if norm_weight == "zero_centred" else weight.float())).to(dtype)
    torch.testing.assert_close(norm(x), want, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    assert norm(x).dtype == dtype
    assert (norm(x) == want).float().mean() > (0.9 if dtype == torch.bfloat16 else 0.0)  # the order of rounding


def test_labels_give_the_sum_of_the_losses_of_the_logits():
    module = filled(small(logit_softcap=3.0))
    tokens, labels = torch.randint(0, 61, (2, 2, 12))
    labels[0, :7] = IGNORE
    want = torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(module(tokens, labels_BT=labels), want, atol=0, rtol=2e-6)
    z = 0.1 * module(tokens).logsumexp(-1).square()[labels != IGNORE].sum()
    torch.testing.assert_close(module(tokens, labels_BT=labels, z_loss=0.1), torch.stack((want + z, z)), atol=0, rtol=2e-6)


def test_scores_with_gradient_are_those_of_the_logits_and_so_is_their_gradient():
    vocabulary = Vocabulary(small(logit_softcap=3.0))
    torch.nn.init.normal_(vocabulary.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 12, vocabulary.weight.shape[1], generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    labels[0, :7] = IGNORE
    logits = vocabulary(x, "logits")
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 12)
    losses, right = vocabulary(x, "scores", labels)
    torch.testing.assert_close(losses, want)
    assert torch.equal(right, (logits.argmax(-1) == labels).float()) and not right[0, :7].any()
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(4))
    leaves = (x, vocabulary.weight)
    torch.testing.assert_close(torch.autograd.grad((losses * weights).sum(), leaves),
                               torch.autograd.grad((want * weights).sum(), leaves))
    with torch.no_grad():
        torch.testing.assert_close(vocabulary(x, "scores", labels), torch.stack((losses, right)))


def test_built_on_the_meta_device_and_names_are_plain():
    module = build_transformer(small(n_layers=1, tie_embeddings=True))
    assert all(p.is_meta for p in module.parameters()) and not list(module.buffers())
    assert [name for name, _ in module.named_parameters()] == [
        "embed.weight", "blocks.0.attn.q.weight", "blocks.0.attn.k.weight", "blocks.0.attn.v.weight",
        "blocks.0.attn.o.weight", "blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight",
        "blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"]
    assert "head.weight" in dict(build_transformer(small()).named_parameters())
    assert module(torch.zeros(2, 8, dtype=torch.int64, device="meta")).shape == (2, 8, 61)


def test_a_fake_forward_leaves_no_fake_tensor_behind():
    module = filled(small())
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.zeros(1, 4, dtype=torch.int64))
    assert torch.isfinite(module(torch.zeros(1, 4, dtype=torch.int64))).all()


def test_positions_matter_per_side_and_not_in_all():
    """RoPE is relative: a shift of all positions changes nothing, a shift after some token does."""
    module = filled(small())
    tokens, positions = torch.randint(0, 61, (1, 10)), torch.arange(10)[None]
    with torch.no_grad():
        want = module(tokens)
        shifted = module(tokens, positions_BT=positions + 5)
        torn = module(tokens, positions_BT=positions + (positions >= 5))
    torch.testing.assert_close(shifted, want, atol=2e-5, rtol=2e-5)
    assert (torn - want).abs().max() > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_compile_once_per_kind_of_layer(recompute):
    module = filled(small(n_layers=6, window=3, window_pattern=[True, False], local_rope=RopeConfig(theta=50.0)))
    tokens = torch.randint(0, 61, (2, 16))
    documents, positions = (x.expand(2, -1) for x in packed([6, 10], 16))
    arguments = dict(labels_BT=tokens, documents_BT=documents, positions_BT=positions)
    want = module(tokens, **arguments)
    grads = torch.autograd.grad(want, list(module.parameters()))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if recompute:
        prepare_blocks(module.blocks, RunConfig(engine=SingleConfig(recompute="full"), model=module.config))
    for block in module.blocks:
        block.compile(backend=count, fullgraph=True)
    got = module(tokens, **arguments)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(got, list(module.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 2  # windowed and global layers, not one for each of six


def test_flex_attention_goes_into_compiled_blocks_whole(monkeypatch, recwarn):
    """On the CPU flex attention has a forward: what a GPU compiles is traced here without a break or a warning."""
    monkeypatch.setattr(kernel, "flex_missing", lambda device, head_dim: None)
    switches = dict(n_layers=4, n_kv_heads=2, head_dim=16, window=40, window_pattern=[True, False], attn_softcap=20.0)
    modules = [filled(small(**switches, attention_impl=impl)) for impl in ("flex", "reference")]
    tokens = torch.randint(0, 61, (2, 256))
    documents = (torch.arange(256) // 100).expand(2, -1).int().contiguous()
    torch._dynamo.reset()
    for block in modules[0].blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        got, want = (module(tokens, documents_BT=documents) for module in modules)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # up to 1.1e-5 off, as the processor sums; a mask is wrong by 1
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]


@pytest.mark.parametrize("rope", [
    RopeConfig(theta=500_000, scaling="llama3", factor=8, original_seq_len=8192),
    RopeConfig(theta=12e6, scaling="llama3", factor=8, original_seq_len=8192),
    RopeConfig(theta=1e6, scaling="linear", factor=8),
    RopeConfig(theta=1e6, scaling="yarn", factor=16, original_seq_len=16_384),
    RopeConfig(theta=1e4, scaling="yarn", factor=4, original_seq_len=4096, attention_factor=1.3, beta_fast=20),
    RopeConfig(theta=1e6)], ids=lambda rope: f"{rope.scaling}-{rope.theta:g}")
def test_frequencies_are_those_of_transformers(rope):
    transformers = pytest.importorskip("transformers")
    parameters = dict(rope_type="default" if rope.scaling == "none" else rope.scaling, rope_theta=rope.theta)
    if rope.scaling != "none":
        parameters |= dict(factor=rope.factor)
    if rope.scaling == "llama3":
        parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    if rope.scaling == "yarn":
        parameters |= dict(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow)
        if rope.attention_factor:
            parameters |= dict(attention_factor=rope.attention_factor)
    if rope.original_seq_len:
        parameters |= dict(original_max_position_embeddings=rope.original_seq_len)
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072,
                                      rope_parameters=parameters)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies, factor = rope_frequencies(rope, 128)
    torch.testing.assert_close(torch.tensor(frequencies), theirs.inv_freq, atol=0, rtol=2e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_errors_name_the_keys():
    with pytest.raises(ValueError, match="model.n_heads=4 is not a multiple of model.n_kv_heads=3"):
        build_transformer(small(n_kv_heads=3))
    with pytest.raises(ValueError, match=r"model.d_model=26 .* set model.head_dim"):
        build_transformer(small(d_model=26))
    with pytest.raises(ValueError, match="model.head_dim=5 is odd"):
        build_transformer(small(head_dim=5))
    module = filled(small())
    with pytest.raises(ValueError, match="documents_BT or cache"):
        module(torch.zeros(1, 2, dtype=torch.int64), documents_BT=torch.zeros(1, 2), cache=module.new_cache())
