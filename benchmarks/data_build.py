"""How fast `officina data build` is, against its tokenizer alone on the same texts with the same number of processes.

    python -m officina.benchmarks.data_build

Text is made from words of a vocabulary by Zipf's law, in JSON lines with language, id and URL as web corpora have them.
The tokenizer alone gets the texts in memory, in batches, and gives back nothing; the build reads, parses, hashes,
looks for duplicates, tokenises, writes shards with checksums, and syncs them to the disk.
"""

import argparse
import json
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


def run(*, megabytes: int = 64, repeats: int = 3) -> dict[str, Any]:
    """Measure both; returns the record."""
    from officina.benchmarks.record import interleaved, record, summary

    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        folder = Path(scratch)
        n_bytes = write_corpus(folder / "corpus.jsonl", megabytes * 10**6)
        tokenizer = train(folder)
        built: list[Path] = []

        def one(name: str) -> float:
            words = [str(folder / "corpus.jsonl"), str(tokenizer)]
            if name == "build":
                built.append(folder / f"out{len(built)}")
                words.append(str(built[-1]))
            done = subprocess.run([sys.executable, "-m", __spec__.name, "--inside", name, *words], check=True, text=True,
                                  capture_output=True)
            return float(done.stdout.split()[-1])

        found = interleaved({name: lambda name=name: one(name) for name in ("tokenizer alone", "build")}, repeats)
        tokens = json.loads((built[-1] / "dataset.json").read_text())["splits"]["train"]["tokens"]
    results = {name: {"time_s": summary(times), "bytes_per_s": summary([n_bytes / t for t in times])}
               for name, times in found.items()}
    results["build"]["share_of_tokenizer_rate"] = summary(
        [alone / build for alone, build in zip(found["tokenizer alone"], found["build"], strict=True)])
    return record("data_build", results, repeats=repeats, settings={
        "text_bytes": n_bytes, "train_tokens": tokens, "vocab_size": VOCABULARY, "processes": PROCESSES,
        "documents_words_mean": DOCUMENT_WORDS})


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
def _alone(corpus: str, tokenizer: str) -> float:
    """Seconds of the tokenizer on the texts in memory, with as many threads as the build has processes."""
    import os

    os.environ["RAYON_NUM_THREADS"] = str(PROCESSES)
    from officina.trainer.data.tokenizer import Encoder, tokenizer_info

    text = Path(tokenizer).read_text()
    encoder = Encoder(text, tokenizer_info(text, ""))
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    batches, batch, size = [], [], 0
    for each in texts:
        batch.append(each)
        size += len(each)
        if size > 1 << 20:
            batches.append(batch)
            batch, size = [], 0
    batches.append(batch)
    begun = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)
    return time.perf_counter() - begun


def _build(corpus: str, tokenizer: str, out: str) -> float:
    """Seconds of the whole build, the start of its processes included."""
    from officina.trainer.data.build import BuildOptions, build

    begun = time.perf_counter()
    build(out, BuildOptions(inputs=[corpus], tokenizer=tokenizer, workers=PROCESSES))
    return time.perf_counter() - begun


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.data_build", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/data_build.json)")
    args = parser.parse_args(argv)
    found = run(megabytes=args.megabytes, repeats=args.repeats)
    from officina.benchmarks.record import write_record

    print(write_record(found, args.out))
    for name, result in found["results"].items():
        print(f"{name:<18} {result['bytes_per_s']['median'] / 1e6:.2f} MB/s")
    share = found["results"]["build"]["share_of_tokenizer_rate"]["median"]
    print(f"the build keeps {share:.1%} of its tokenizer's rate")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        name, *words = sys.argv[2:]
        print(_alone(*words) if name == "tokenizer alone" else _build(*words))
        sys.exit()
    main()
