"""How fast `officina data build` is, against its tokenizer alone on the same texts in the same number of processes.

    python -m officina.benchmarks.data_build

Text is made from words of a vocabulary by Zipf's law, in JSON lines with language, id and URL as web corpora have them.
The tokenizer alone gets the texts in memory, in batches, one thread a process, and gives back nothing; its time begins when
all have theirs. The build reads, parses, hashes, looks for duplicates, tokenises, writes shards with checksums, and syncs them
to the disk; its time holds the start of its processes. They take turns, in one order and then in the other. Beside the time
stands what the processors worked, which tells more where others use the machine.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 32_000
DOCUMENT_WORDS = 400
PROCESSES = 2
_ADOPT = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): a build's workers are counted here, whoever started them."""


def run(*, megabytes: int = 96, repeats: int = 5) -> dict[str, Any]:
    """Measure both; returns the record."""
    from officina.benchmarks.record import record, summary
    from officina.benchmarks.turns import median_interval

    names = ("tokenizer alone", "build")
    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        folder = Path(scratch)
        n_bytes = write_corpus(folder / "corpus.jsonl", megabytes * 10**6)
        tokenizer = train(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in range(repeats):
            for name in names[::-1 if i % 2 else 1]:
                found[name].append(_measured(name, folder / "corpus.jsonl", tokenizer, folder / f"out{i}"))
        tokens = json.loads((folder / "out0" / "dataset.json").read_text())["splits"]["train"]["tokens"]
    results: dict[str, Any] = {
        name: {"time_s": summary([turn["time_s"] for turn in turns]), "cpu_s": summary([turn["cpu_s"] for turn in turns]),
               "bytes_per_s": summary([n_bytes / turn["time_s"] for turn in turns])} for name, turns in found.items()}
    for share, unit in (("share_of_tokenizer_rate", "time_s"), ("share_by_cpu_time", "cpu_s")):
        shares = [alone[unit] / build[unit] for alone, build in zip(found["tokenizer alone"], found["build"], strict=True)]
        low, high = median_interval(shares)
        results["build"][share] = summary(shares) | {"low": low, "high": high}
    return record("data_build", results, repeats=repeats, settings={
        "text_bytes": n_bytes, "train_tokens": tokens, "vocab_size": VOCABULARY, "processes": PROCESSES,
        "documents_words_mean": DOCUMENT_WORDS})


def _measured(name: str, corpus: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """Time and processor time of one turn, in a process of its own."""
    ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)
    before_s = _cpu_s(resource.RUSAGE_CHILDREN)
    words = [name, str(corpus), str(tokenizer), *([str(out)] if name == "build" else [])]
    done = subprocess.run([sys.executable, "-m", __spec__.name, "--inside", *words], check=True, text=True, capture_output=True)
    turn = json.loads(done.stdout)
    try:
        while True:
            os.wait()  # those that the ended process left: they end with it
    except ChildProcessError:
        pass
    if "cpu_before_s" in turn:
        turn["cpu_s"] = _cpu_s(resource.RUSAGE_CHILDREN) - before_s - turn.pop("cpu_before_s")
    return turn


def _cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def write_corpus(path: Path, n_bytes: int, seed: int = 0) -> int:
    """JSON lines with about `n_bytes` of text; returns the bytes of all texts."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("etaoinshrdlucmfwypvbgk"))
    words = np.asarray(["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, 60_000)])
    written = number = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < n_bytes:
            n = int(rng.lognormal(np.log(DOCUMENT_WORDS), 0.8)) + 1
            text = " ".join(words[np.minimum(rng.zipf(1.2, n) - 1, len(words) - 1)])
            row = {"u": f"https://example.org/{number}", "ts": "2024-01-01T00:00:00Z", "lang": ["eng_Latn"], "filter": "keep",
                   "text": text, "id": f"{number:032x}"}
            file.write(json.dumps(row) + "\n")
            written, number = written + len(text), number + 1
    return written


def train(folder: Path) -> Path:
    """A tokenizer of the corpus."""
    from officina.trainer.data.tokenizer import train_tokenizer

    texts, size = [], 0
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size > 8 << 20:
                break
    path = folder / "tokenizer.json"
    path.write_text(train_tokenizer([texts], VOCABULARY, ""))
    return path


# ---- in a process of its own -----------------------------------------------------------------------------------------
def _alone(corpus: str, tokenizer: str) -> dict[str, float]:
    """The tokenizer on the texts in memory, in as many processes as the build has."""
    context = multiprocessing.get_context("forkserver")
    ready, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=_encode, args=(corpus, tokenizer, part, ready, answers)) for part in range(PROCESSES)]
    for process in processes:
        process.start()
    turns = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    begun, ended, cpu = zip(*turns, strict=True)
    return {"time_s": max(ended) - min(begun), "cpu_s": sum(cpu)}


def _encode(corpus: str, tokenizer: str, part: int, ready: Any, answers: Any) -> None:
    """Every PROCESSES-th text, in the build's batches; answers begin, end and processor time."""
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    from officina.trainer.data.parts import BATCH_CHARACTERS
    from officina.trainer.data.tokenizer import Encoder, tokenizer_info

    text = Path(tokenizer).read_text()
    encoder = Encoder(text, tokenizer_info(text, ""))
    batches: list[list[str]] = [[]]
    size = 0
    with open(corpus, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % PROCESSES != part:
                continue
            if size >= BATCH_CHARACTERS:
                batches.append([])
                size = 0
            batches[-1].append(json.loads(line)["text"])
            size += len(batches[-1][-1])
    ready.wait()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        encoder.encode(batch)
    answers.put((begun, time.perf_counter(), time.process_time() - begun_cpu))


def _build(corpus: str, tokenizer: str, out: str) -> dict[str, float]:
    """The whole build, the start of its processes included."""
    from officina.trainer.data.build import BuildOptions, build

    begun, before_s = time.perf_counter(), _cpu_s(resource.RUSAGE_SELF)
    build(out, BuildOptions(inputs=[corpus], tokenizer=tokenizer, workers=PROCESSES))
    return {"time_s": time.perf_counter() - begun, "cpu_before_s": before_s}


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.data_build", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/data_build.json)")
    args = parser.parse_args(argv)
    found = run(megabytes=args.megabytes, repeats=args.repeats)
    from officina.benchmarks.record import write_record

    print(write_record(found, args.out))
    for name, result in found["results"].items():
        print(f"{name:<18} {result['bytes_per_s']['median'] / 1e6:.2f} MB/s, {result['cpu_s']['median']:.1f} processor seconds")
    for share, of in (("share_of_tokenizer_rate", "rate"), ("share_by_cpu_time", "rate by processor time")):
        value = found["results"]["build"][share]
        print(f"the build keeps {value['median']:.1%} ({value['low']:.1%} to {value['high']:.1%}) of its tokenizer's {of}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        name, *words = sys.argv[2:]
        print(json.dumps(_alone(*words) if name == "tokenizer alone" else _build(*words)))
        sys.exit()
    main()
