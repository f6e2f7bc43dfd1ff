"""A step of supervised fine-tuning: officina against TRL's SFTTrainer, which packs, pads, or takes samples one by one.

    python -m officina.benchmarks.sft

One process each on the CPU, turn by turn, from one folder with a small Llama, its tokenizer and chat template. A step is one
pass over the same conversations, whose lengths spread as those of chats do: whoever packs or pads, the tokens that are no
padding and those that are trained on are the same, and so must the loss of the first step be. Each starts from the same
conversations, tokenises and packs them itself, and trains on the answers only, no sample seeing another.

TRL is installed without its dependencies, which are here, into a folder that only its processes see.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from officina.benchmarks.entrants import alone, llama_config, officina, trainer_settings
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import Block, Entrant, Turns, blocks_in, compare, race
from officina.benchmarks.workload import write_run
from officina.configs.compose import compose
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.chat import PLAIN
from officina.trainer.data.reader import RowReader
from officina.trainer.data.tokenizer import EOS, train_tokenizer
from officina.trainer.errors import EXIT_USER, OfficinaError
from officina.trainer.metrics import read_metrics
from officina.trainer.rank_env import RankEnv
from officina.trainer.run_dir import load_config

TRL = "trl==1.16.0"
OURS, PACKED, PADDED, ALONE = "officina", "TRL, packed", "TRL, padded", "TRL, one by one"
SAMPLES, SEQ_LEN, MICRO_ROWS = 32, 512, 4
VOCABULARY = 2048
WORDS = ["model=from_init", "steps=100000", "device=cpu", "threads=1", "checkpoint=at_end", "data.prefetch_batches=1",
         f"batch.seq_len={SEQ_LEN}", f"batch.micro_rows={MICRO_ROWS}", "optim.lr=1e-4", "optim.weight_decay=0"]
SAME = {"fp32": 1e-5, "bf16": 2e-4}
"""Largest relative difference of the losses of the first step."""


def run(*, blocks: int = 6, steps: int = 1, precisions: tuple[str, ...] = ("fp32", "bf16")) -> dict[str, Any]:
    """Measure; returns the record."""
    results: dict[str, Any] = {}
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        trl = install_trl(Path(scratch) / "trl")
        prepare(Path(scratch))
        for precision in precisions:
            results[precision] = measure(Path(scratch), trl, precision, blocks, steps)
    settings = {"words": WORDS, "against": TRL, "steps_per_block": steps, "device": "cpu",
                "load_average": [before, os.getloadavg()]}
    return record("sft", results, settings=settings, repeats=blocks_in(results))


def install_trl(folder: Path) -> Path:
    """TRL in a folder of its own. Raises OfficinaError where pip cannot bring it."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OfficinaError(f"{TRL}, which officina is measured against, could not be installed: {done.stderr.strip()[-500:]}\n"
                            "It needs pip's network, or PIP_FIND_LINKS=FOLDER with its wheel.")
    return folder


def measure(scratch: Path, trl: Path, precision: str, blocks: int, steps: int) -> dict[str, Any]:
    """Tokens per second of all, and ours relative to the others. Raises ValueError if they did not do the same."""
    run_dir, ours = plan(scratch, precision)
    theirs = partial(sft_trainer, run_dir=run_dir, scratch=scratch, trl=trl)
    micros = load_config(run_dir).batch.micro_steps(1)
    # The rows that it packs into a micro-batch are one sequence, and attention on a CPU counts its square: one row is fastest.
    entrants = {PACKED: partial(theirs, packing=True, micro=1),
                PADDED: partial(theirs, packing=False, micro=-(-SAMPLES // micros)),
                ALONE: partial(theirs, packing=False, micro=1)}
    found = race({name: Entrant(work) for name, work in ({OURS: partial(officina, run_dir=run_dir)} | entrants).items()},
                 blocks=blocks, steps=steps, lead=1, warmup=0)
    work = {OURS: ours | first_step(run_dir)} | {name: found[name][0].facts["work"] for name in entrants}
    return report(found, work, precision, steps)


def plan(scratch: Path, precision: str) -> tuple[Path, dict[str, Any]]:
    """The run, of which a step is all rows of the data set, and what is known of that step before."""
    words = [*WORDS, f"precision={precision}", f"init_from={scratch / 'base'}", f"data.sources.chats.path={scratch / 'data'}"]
    [stream] = RowReader(compose(words), 0).streams.values()
    positions = len(stream.plan) * SEQ_LEN
    run_dir = write_run([*words, f"batch.global_tokens={positions}", f"name={precision}"], scratch / "runs")
    return run_dir, {"samples": len(stream.plan.starts), "tokens": stream.plan.tokens, "positions": positions}


def first_step(run_dir: Path) -> dict[str, Any]:
    """What the run says of its first step."""
    step = read_metrics(run_dir).steps[0]
    return {"loss_nats": step.loss_nats, "trained_tokens": step.tokens}


def report(found: dict[str, list[Block]], work: dict[str, dict[str, Any]], precision: str, steps: int) -> dict[str, Any]:
    """Figures of one precision. work: what a step is, for each. Raises ValueError where it is not the same."""
    ours = work[OURS]
    for name, other in work.items():
        for what in ("samples", "tokens", "trained_tokens"):
            if other[what] != ours[what]:
                raise ValueError(f"{name} has {other[what]} {what} a step, officina {ours[what]}: not the same work")
        if not abs(other["loss_nats"] / ours["loss_nats"] - 1) < SAME[precision]:
            raise ValueError(f"{name}: loss of the first step {other['loss_nats']}, officina's {ours['loss_nats']}")
    speed = {name: [ours["tokens"] * steps / b.seconds for b in of] for name, of in found.items()}
    cpu = {name: [ours["tokens"] * steps / b.facts["cpu_s"] for b in of] for name, of in found.items()}
    results: dict[str, Any] = {
        "step": work, "filled": {name: ours["tokens"] / of["positions"] for name, of in work.items()},
        "tokens_per_s": {name: summary(of) for name, of in speed.items()},
        "trained_tokens_per_s": {name: summary([ours["trained_tokens"] / ours["tokens"] * each for each in of])
                                 for name, of in speed.items()}}
    for name in list(work)[1:]:
        results[f"speed against {name}"] = compare(found, OURS, name)
        results[f"tokens per CPU second against {name}"] = summary([a / b for a, b in zip(cpu[OURS], cpu[name], strict=True)])
    return results


# ---- conversations and model -----------------------------------------------------------------------------------------
def prepare(scratch: Path) -> list[dict[str, Any]]:
    """Conversations, the model's folder and the data set of officina; returns the conversations."""
    rows = write_chats(scratch / "chats.jsonl")
    write_base(scratch / "base", rows)
    build(scratch / "data", BuildOptions(inputs=[scratch / "chats.jsonl"], samples=True, tokenizer=scratch / "base",
                                         validation=0.0, workers=1))
    return rows


def write_chats(path: Path, samples: int = SAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one to three turns of made words; lengths of questions and answers are log-normal, as chats' are."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("etaoinshrdlucmfwypvbgk"))
    words = np.asarray(["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, 4000)])

    def say(median: int, most: int) -> str:
        n = min(max(int(rng.lognormal(np.log(median), 1.0)), 2), most)
        return " ".join(words[np.minimum(rng.zipf(1.3, n) - 1, len(words) - 1)])

    rows = []
    for _ in range(samples):
        turns = int(rng.choice([1, 1, 1, 2, 3]))
        rows.append({"messages": [{"role": role, "content": say(median, most // turns)} for _ in range(turns)
                                  for role, median, most in (("user", 12, 60), ("assistant", 40, 300))]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def write_base(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The tiny model as a Llama of transformers with random weights, a tokenizer of these words and the plain template."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir()
    texts = [message["content"] for row in rows for message in row["messages"]]
    (folder / "tokenizer.json").write_text(train_tokenizer([texts], VOCABULARY, ""))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = compose(["model=tiny", f"model.vocab_size={VOCABULARY}", "data.sources.none.path=none"]).model
    LlamaForCausalLM(llama_config(model, SEQ_LEN)).save_pretrained(folder)


# ---- TRL -------------------------------------------------------------------------------------------------------------
def sft_trainer(turns: Turns, env: RankEnv, *, run_dir: Path, scratch: Path, trl: Path, packing: bool, micro: int) -> None:
    """TRL's SFTTrainer on the conversations, from the folder that the run starts from; a step is a pass over all of them.

    micro: rows, or samples, of a micro-batch. Its facts: `work`, what a step is.
    """
    sys.path.append(str(trl))
    run, ranks = alone(run_dir, env)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (scratch / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = SFTConfig(
        **trainer_settings(run, ranks, scratch / "hf"), packing=packing, max_length=run.batch.seq_len, assistant_only_loss=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(rows),  # more than there are: a step ends with the epoch
        logging_strategy="steps", logging_steps=10**6, logging_first_step=True)

    class Borders(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            turns.at_step()
            if state.log_history:
                turns.facts["work"] = work | {"loss_nats": state.log_history[0]["loss"]}

    trainer = SFTTrainer(run.init_from, args=settings, train_dataset=Dataset.from_list(rows), callbacks=[Borders()],
                         processing_class=AutoTokenizer.from_pretrained(run.init_from))
    work = _work(trainer.train_dataset, trainer.get_train_dataloader())
    trainer.train()


def _work(data: Any, batches: Any) -> dict[str, Any]:
    """What one pass over TRL's data set is."""
    trained = positions = 0
    for batch in batches:
        positions += batch["input_ids"].numel()
        trained += int((batch["labels"][:, 1:] != -100).sum())
    return {"samples": sum(len(row.get("seq_lengths", [0])) for row in data), "positions": positions,
            "tokens": sum(len(row["input_ids"]) for row in data), "trained_tokens": trained}


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/sft.json."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.sft", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="blocks of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a block (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="file of the record")
    args = parser.parse_args(argv)
    try:
        found = run(blocks=args.blocks, steps=args.steps, precisions=tuple(args.precision))
    except OfficinaError as error:
        print(f"officina bench sft: {error}", file=sys.stderr)
        return EXIT_USER
    path = write_record(found, args.out)
    for precision, result in found["results"].items():
        for name, speed in result["tokens_per_s"].items():
            print(f"{precision}  {name:<12} {speed['median']:8,.0f} tokens/s, rows filled to {result['filled'][name]:.0%}")
        for what in (key for key in result if "against" in key):
            print(f"{precision}  {what}: {result[what]['median']:.3f}")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
