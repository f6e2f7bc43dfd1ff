"""The benchmark of fine-tuning compares equal work or nothing; what officina does in it, against transformers."""

import json
from functools import partial

import pytest
import torch

from officina.benchmarks import sft, table
from officina.benchmarks.entrants import officina
from officina.benchmarks.turns import Block, Entrant, race
from officina.trainer.batch import IGNORE
from officina.trainer.errors import EXIT_USER


def test_a_step_is_every_conversation_once_and_its_loss_that_of_transformers(tmp_path):
    """The answers' loss over all conversations, one by one and unpacked, by transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = sft.prepare(tmp_path)
    run_dir, ours = sft.plan(tmp_path, "fp32")
    race({"officina": Entrant(partial(officina, run_dir=run_dir))}, blocks=1, steps=1, lead=0, warmup=0)
    ours |= sft.first_step(run_dir)
    model, tokenizer = (kind.from_pretrained(tmp_path / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    loss = tokens = trained = 0
    for row in rows:
        sample = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["assistant_masks"]).bool()
        labels = torch.where(mask, ids, IGNORE)[1:]
        with torch.no_grad():
            loss += torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], labels, reduction="sum").item()
        tokens, trained = tokens + len(ids), trained + int((labels != IGNORE).sum())
    assert (ours["samples"], ours["tokens"], ours["trained_tokens"]) == (sft.SAMPLES, tokens, trained)
    assert ours["loss_nats"] == pytest.approx(loss / trained, rel=1e-6)


def test_without_trl_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert sft.main(["--out", str(tmp_path / "sft.json")]) == EXIT_USER
    said = capsys.readouterr().err
    assert "trl==1.16.0, which officina is measured against, could not be installed" in said and "PIP_FIND_LINKS=" in said
    assert not (tmp_path / "sft.json").exists()


WORK = {"samples": 32, "tokens": 6000, "trained_tokens": 3000, "positions": 6144, "loss_nats": 7.6}


def test_work_that_is_not_equal_is_no_record():
    found = {name: [Block(seconds, {"cpu_s": seconds})] * 3 for name, seconds in
             ((sft.OURS, 1.0), (sft.PACKED, 1.5), (sft.PADDED, 2.0), (sft.ALONE, 1.25))}
    work = {sft.OURS: WORK, sft.PACKED: WORK | {"positions": 6000}, sft.PADDED: WORK | {"positions": 12000}, sft.ALONE: WORK}
    told = sft.report(found, work, "fp32", steps=1)
    assert told["tokens_per_s"][sft.OURS]["median"] == 6000 and told["trained_tokens_per_s"][sft.PADDED]["median"] == 1500
    assert told[f"speed against {sft.PACKED}"]["median"] == 1.5 and told["filled"][sft.PADDED] == 0.5
    page = table.fill("<!-- record: sft -->\n<!-- end -->", {"sft": json.loads(json.dumps(
        sft.record("sft", {"fp32": told}, settings={}, repeats=3)))})
    assert "| fp32 | TRL, padded | 50% | 3,000 | 1,500 | 2.000 (2.000 to 2.000) |" in page
    for what, value in (("samples", 31), ("tokens", 6001), ("trained_tokens", 2999), ("loss_nats", 7.6002)):
        with pytest.raises(ValueError, match=r"officina"):
            sft.report(found, work | {sft.PACKED: WORK | {what: value}}, "fp32", steps=1)
