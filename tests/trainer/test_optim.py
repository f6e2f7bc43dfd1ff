"""Which parameter is updated how, and Muon's orthogonalisation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from officina.trainer.config import AdamWConfig, DecoderConfig, MuonConfig
from officina.trainer.model.build import build_transformer
from officina.trainer.muon import Muon, Split, orthogonalize
from officina.trainer.optim import Groups, Optimizer, group_parameters, new_adamw, new_adamw_state

DECODER = DecoderConfig(vocab_size=64, n_layers=2, d_model=16, n_heads=2, d_ff=32, qk_norm="head", qkv_bias=True, mlp_bias=True)


def groups_of(config: DecoderConfig, optim: AdamWConfig):
    module = build_transformer(config)
    return module, group_parameters(module, module.blocks, optim)


def test_matrices_decay_and_nothing_else():
    module, groups = groups_of(DECODER, AdamWConfig())
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert sorted(groups.decayed + groups.plain) == sorted(shapes) and not groups.muon
    assert set(groups.decayed) == {
        *(f"blocks.{i}.attn.{m}.weight" for i in (0, 1) for m in "qkvo"),
        *(f"blocks.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("gate", "up", "down")), "head.weight"}


def test_tied_embedding_is_there_once_and_does_not_decay():
    _, groups = groups_of(replace(DECODER, tie_embeddings=True), AdamWConfig())
    assert "embed.weight" in groups.plain and "head.weight" not in groups.decayed + groups.plain


def test_muon_takes_the_matrices_of_the_blocks():
    _, groups = groups_of(replace(DECODER, mlp="xielu"), MuonConfig())
    assert all(name.startswith("blocks") and name.endswith("weight") for name in groups.muon) and len(groups.muon) == 12
    assert groups.decayed == ("head.weight",)
    assert "blocks.0.mlp.alpha_p" in groups.plain and "embed.weight" in groups.plain


class Odd(nn.Module):
    """Parameters of all kinds that users have."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup, self.patch, self.place = nn.Embedding(5, 4), nn.Conv2d(3, 4, 2), nn.Parameter(torch.zeros(1, 7, 4))
        self.blocks = nn.ModuleList([nn.Conv1d(4, 4, 3), nn.LayerNorm((2, 4)), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.lookup.weight
        self.blocks[2].weight.requires_grad_(False)


def test_groups_of_a_users_module():
    module = Odd()
    groups = group_parameters(module, module.blocks, MuonConfig())
    assert groups.muon == ()  # a convolution is no matrix, and the one matrix is frozen
    assert groups.decayed == ("patch.weight", "blocks.0.weight")
    assert set(groups.plain) == {"lookup.weight", "patch.bias", "place", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias",
                                 "blocks.2.bias"}


def test_weight_decay_and_rates_reach_the_optimizer():
    module, groups = groups_of(DECODER, AdamWConfig())
    module.to_empty(device="cpu")
    optimizer = new_adamw(AdamWConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.25), groups,
                          dict(module.named_parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert {(g["lr"], g["betas"], g["eps"], g["fused"]) for g in optimizer.param_groups} == {(0.5, (0.8, 0.7), 1e-3, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_to_the_bit(dtype):
    """Two decay groups, rates of a schedule, a parameter without a gradient, and moments that begin after some steps."""
    torch.manual_seed(0)
    config = AdamWConfig(lr=0.01, beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.25)
    groups = Groups(("a", "b"), ("c", "d"), ())
    ours = {name: nn.Parameter(torch.randn(3, 5, dtype=torch.float32 if name == "b" else dtype)) for name in "abcd"}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    optimizer, wanted = Optimizer(config, groups, ours, Split()), new_adamw(config, groups, theirs)
    optimizer.reset(3)
    for parameter in theirs.values():
        wanted.state[parameter] = new_adamw_state(parameter.detach(), 3)
    for step in range(5):
        for name in "abcd":
            ours[name].grad = None if name == "d" else torch.randn(3, 5).to(ours[name].dtype)
            theirs[name].grad = ours[name].grad
        for group in wanted.param_groups:
            group["lr"] = config.lr * (1 - step / 10)
        optimizer.step(1 - step / 10)
        wanted.step()
    for name in "abcd":
        assert torch.equal(ours[name], theirs[name])
        for slot, tensor in optimizer.slots(name):
            assert torch.equal(tensor, wanted.state[theirs[name]][slot])
    assert {slot for slot, _ in optimizer.slots("a")} == {"exp_avg", "exp_avg_sq"} and len(optimizer.moments()) == 8


def test_adamw_without_any_parameter_of_its_own():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.eye(2)
    optimizer = Optimizer(MuonConfig(), Groups((), (), ("w",)), {"w": weight}, Split())
    optimizer.step(1.0)
    assert not torch.equal(weight, torch.ones(2, 2)) and [slot for slot, _ in optimizer.slots("w")] == ["momentum"]
    assert [tensor for _, tensor in optimizer.slots("w")] == optimizer.moments()  # what memory by part counts
    assert optimizer.slots("unknown") == []


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16), (1, 5)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    for dtype, wide in ((torch.float32, 0.35), (torch.bfloat16, 0.4)):
        values = torch.linalg.svdvals(orthogonalize(matrix, 5, dtype).float())
        assert (values - 1).abs().max() < wide
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    # The same singular vectors: what is left over besides u v is small.
    assert ((u.T @ orthogonalize(matrix, 5, torch.float32) @ v.T).triu(1).abs().max() if min(shape) > 1 else 0) < 1e-3


def test_zero_gradient_stays_finite():
    assert orthogonalize(torch.zeros(4, 4), 5, torch.float32).abs().max() == 0


def test_muon_without_nesterov_follows_the_momentum():
    weight = nn.Parameter(torch.zeros(3, 3))
    muon = Muon(MuonConfig(nesterov=False, momentum=0.5, muon_lr=1.0, weight_decay=0.0, newton_schulz_dtype="fp32"),
                {"w": weight}, Split())
    muon.reset()
    gradients = torch.randn(2, 3, 3)
    for gradient in gradients:
        weight.grad = gradient
        muon.step(1.0)
    assert torch.allclose(muon.momentum["w"], 0.25 * gradients[0] + 0.5 * gradients[1])
    first, second = orthogonalize(0.5 * gradients[0], 5, torch.float32), orthogonalize(muon.momentum["w"], 5, torch.float32)
    assert torch.allclose(weight, -first - second, atol=1e-6)
