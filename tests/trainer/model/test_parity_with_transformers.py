"""Small random models of transformers with our module's weights: logits and gradients must agree.

The classes of transformers are what the published weights were made for, so equality here proves each switch.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from officina.trainer.config import DecoderConfig, RopeConfig  # noqa: E402
from officina.trainer.model.build import build_transformer  # noqa: E402

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager", pad_token_id=0)
OURS = dict(vocab_size=97, d_model=48, d_ff=80, n_layers=4, n_heads=4, n_kv_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8.0)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CASES = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5), dict(norm_eps=1e-5)),
    "llama-tied-biases": (
        "Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        dict(qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=True, norm_eps=1e-6)),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3), dict(norm_eps=1e-6, rope=RopeConfig(
        theta=500, scaling="llama3", factor=8, original_seq_len=64))),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0)),
                     dict(norm_eps=1e-6, rope=RopeConfig(theta=500, scaling="linear", factor=3))),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN), dict(norm_eps=1e-6, rope=RopeConfig(
        theta=500, scaling="yarn", factor=4, original_seq_len=16, beta_fast=8))),
    "mistral-window": ("Mistral", dict(sliding_window=7, head_dim=16), dict(window=7, head_dim=16, norm_eps=1e-6)),
    "qwen2": ("Qwen2", dict(), dict(qkv_bias=True, norm_eps=1e-6)),
    "qwen3": ("Qwen3", dict(head_dim=20), dict(qk_norm="head", head_dim=20, norm_eps=1e-6)),
    "olmo2": ("Olmo2", dict(rms_norm_eps=1e-6), dict(
        qk_norm="full", norm_placement="post", norm_cast="after", norm_eps=1e-6)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=9, layer_types=WINDOWS, query_pre_attn_scalar=24), dict(
        head_dim=16, window=9, window_pattern=[True, False], attn_scale=24**-0.5, attn_softcap=50, logit_softcap=30,
        mlp="geglu", norm_placement="sandwich", norm_weight="zero_centred", norm_cast="after", tie_embeddings=True,
        embed_scale=48**0.5, norm_eps=1e-6)),
    "gemma3": ("Gemma3", dict(
        head_dim=16, sliding_window=9, layer_types=WINDOWS, query_pre_attn_scalar=24,
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=300.0),
                             full_attention=dict(rope_type="linear", rope_theta=9000.0, factor=8.0))), dict(
        head_dim=16, window=9, window_pattern=[True, False], attn_scale=24**-0.5, qk_norm="head", mlp="geglu",
        norm_placement="sandwich", norm_weight="zero_centred", norm_cast="after", tie_embeddings=True, embed_scale=48**0.5,
        norm_eps=1e-6, local_rope=RopeConfig(theta=300), rope=RopeConfig(theta=9000, scaling="linear", factor=8))),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 1, 1, 0], tie_word_embeddings=True, rope_parameters=dict(
        rope_type="default", rope_theta=5e6)), dict(
        rope_pattern=[True, True, True, False], tie_embeddings=True, rope=RopeConfig(theta=5e6), norm_eps=1e-6)),
    "apertus": ("Apertus", dict(rope_parameters=LLAMA3, rms_norm_eps=1e-5), dict(
        mlp="xielu", qk_norm="head", norm_eps=1e-5, rope=RopeConfig(
            theta=500, scaling="llama3", factor=8, original_seq_len=64))),
}

NAMES = [("embed_tokens", "embed"), ("lm_head", "head"), ("layers", "blocks"), ("self_attn", "attn"),
         ("_proj", ""), ("mlp.act_fn.alpha", "mlp.alpha"), ("pre_feedforward_layernorm", "mlp_norm"),
         ("post_feedforward_layernorm", "mlp_post_norm"), ("attention_layernorm", "attn_norm"),
         ("feedforward_layernorm", "mlp_norm"), ("input_layernorm", "attn_norm")]


def our_name(theirs: str, placement: str) -> str:
    """Name of the same parameter in our module."""
    name = theirs.removeprefix("model.")
    after_attention = "mlp_norm" if placement == "pre" else "attn_post_norm"
    for old, new in [("post_attention_layernorm", after_attention), *NAMES]:
        name = name.replace(old, new)
    return name


def their_model(kind: str, options: dict) -> torch.nn.Module:
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**{**SMALL, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():  # norms and biases start as constants, which would prove little
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case):
    kind, theirs, ours = CASES[case]
    reference, config = their_model(kind, theirs), DecoderConfig(**{**OURS, **ours})
    module = build_transformer(config).to_empty(device="cpu")
    source = {our_name(name, config.norm_placement): p for name, p in reference.named_parameters()}
    names = dict(module.named_parameters())
    assert source.keys() == names.keys()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(source[name])

    tokens = torch.randint(1, 97, (2, 40))
    want = reference(tokens, use_cache=False).logits
    got = module(tokens)
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())

    labels = torch.randint(0, 97, (2, 40))
    labels[0, :5] = -100
    torch.nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    module(tokens, labels_BT=labels).backward()
    whole = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    for name, parameter in module.named_parameters():
        expected = source[name].grad
        error = (parameter.grad - expected).norm()
        # The second term: xIELU's alphas are single numbers whose gradient is a sum that nearly cancels.
        assert error <= 2e-5 * expected.norm() + 1e-7 * whole, f"{name}: {error:.1e} off, norm {expected.norm():.1e}"


@pytest.mark.parametrize("case", CASES)
def test_every_switch_of_a_case_changes_the_logits(case):
    """The control: a comparison that a wrong switch would pass proves nothing."""
    _, _, ours = CASES[case]
    torch.manual_seed(0)
    tokens = torch.randint(1, 97, (1, 40))
    right = _logits(DecoderConfig(**{**OURS, **ours}), tokens)
    for key in ("rope", "window", "norm_weight", "embed_scale", "attn_softcap", "logit_softcap", "attn_scale",
                "rope_pattern", "local_rope", "mlp", "norm_eps"):
        if key in ours and not (key == "mlp" and ours[key] == "xielu"):
            without = {k: v for k, v in ours.items() if k != key}
            without |= {"norm_eps": 1e-2} if key == "norm_eps" else {}
            wrong = _logits(DecoderConfig(**{**OURS, **without}), tokens)
            assert (wrong - right).abs().max() > 1e-4, key


def _logits(config: DecoderConfig, tokens: torch.Tensor) -> torch.Tensor:
    module = build_transformer(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
        return module(tokens)
