"""Every family in and out: transformers' own small random models are the oracle."""

import json
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import CASES, as_v4, save

from officina.trainer.hf.base import open_base
from officina.trainer.hf.config_file import family_for, read_config, write_config
from officina.trainer.hf.family import canonical
from officina.trainer.hf.source import FolderSource
from officina.trainer.model.build import build_transformer
from officina.trainer.state import PARAM


def ours(folder):
    """Our module with the folder's weights."""
    base = open_base(str(folder))
    module = build_transformer(base.model).to_empty(device="cpu")
    source = FolderSource(base, {name: tuple(p.shape) for name, p in module.named_parameters()})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(source.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
    return base, module


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, tmp_path):
    theirs = save(case, tmp_path)
    base, module = ours(tmp_path)
    vocab = base.model.vocab_size
    tokens = torch.randint(1, vocab, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs.config._attn_implementation = "eager"  # the one that knows windows and softcaps everywhere
    want, got = theirs(tokens, use_cache=False).logits, module(tokens)
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())

    labels = torch.randint(0, vocab, (2, 40), generator=torch.Generator().manual_seed(2))
    torch.nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    module(tokens, labels_BT=labels).backward()
    named = dict(theirs.named_parameters())
    whole = torch.stack([p.grad.norm() for p in named.values()]).norm()
    assert len(named) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        expected = named[base.family.their_name(name)].grad
        assert (parameter.grad - expected).norm() <= 2e-5 * expected.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_the_configuration_mean_the_same_and_come_back(case, tmp_path):
    save(case, tmp_path)
    v5 = json.loads((tmp_path / "config.json").read_text())
    models = []
    for raw in (v5, as_v4(v5)):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        base = open_base(str(tmp_path))
        models.append(canonical(base.model))
        assert write_config(base.model, base.family, base=raw) == raw  # as the source had it
        grown = replace(base.model, vocab_size=base.model.vocab_size + 8)
        changed = write_config(grown, base.family, base=raw)  # in the form of the source, with what changed
        assert ("rope_parameters" in changed) == ("rope_parameters" in raw) and changed["vocab_size"] == grown.vocab_size
        assert canonical(read_config(changed)[1]) == canonical(grown)

        anew = write_config(base.model, base.family, max_seq_len=256)  # and from the model alone
        again = read_config(anew)[1]
        assert canonical(again) == canonical(base.model) and again.init_std == base.model.init_std
        assert canonical(read_config(write_config(base.model, family_for(base.model)))[1]) == canonical(base.model)
        spelt_otherwise = {"layer_types", "sliding_window", "max_window_layers", "rope_scaling"}
        shared = {key for key in anew.keys() & raw.keys() - spelt_otherwise if not key.endswith("_token_id")}
        assert {k: anew[k] for k in shared} == {k: raw[k] for k in shared}
    assert models[0] == models[1]


def test_a_range_is_read_and_nothing_else(tmp_path, monkeypatch):
    save("llama", tmp_path)
    base = open_base(str(tmp_path))
    source = FolderSource(base, {n: tuple(p.shape) for n, p in build_transformer(base.model).named_parameters()})
    whole = source.read("embed.weight", PARAM, 0, 97 * 48)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read.append(sum(t.nbytes for t in to)) or preadv(fd, to, at))
    assert torch.equal(source.read("embed.weight", PARAM, 1001, 1500), whole[1001:1500])
    assert sum(read) == 2 * 499  # bf16
    for start, stop in ((-1, 5), (0, 97 * 48 + 1), (9, 8)):
        with pytest.raises(IndexError):
            source.read("embed.weight", PARAM, start, stop)
    with pytest.raises(KeyError):
        source.read("embed.weight", "exp_avg", 0, 1)
