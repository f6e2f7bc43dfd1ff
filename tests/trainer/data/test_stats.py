"""What `officina data stats` tells, recounted from the texts and the tokenizer alone."""

import hashlib
import json
import math
from collections import Counter
from itertools import dropwhile, islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from officina.launch.cli import main
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.documents import Fields
from officina.trainer.data.megatron import export_megatron, index_folder
from officina.trainer.data.stats import BINS_PER_OCTAVE, Counts, statistics

CODES = {"fi": "fin_Latn", "sv": "swe_Latn", None: "und"}


def make_rows(n: int, seed: int) -> list[dict]:
    """Texts of 1 to 400 words, some of several bytes a letter, with every kind of white space; no two the same."""
    rng = np.random.default_rng(seed)
    words = ["talo", "järvi", "ő", "日本", "a", "mökki-ilta,", "the", "42"]
    spaces = [" ", "  ", "\n", "\t", "\u00a0", "\u3000"]
    rows = []
    for i in range(n):
        picked = rng.choice(words, int(2 ** rng.uniform(0, 8.6))).tolist()
        text = "".join(word + str(rng.choice(spaces)) for word in picked) + f"{seed}.{i}"
        rows.append({"text": text, "from": f"s{i % 3}", "lang": ("fi", "sv", None)[i % 4 % 3]})
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wiki and laws under one tokenizer, and meg, which is laws as Megatron's files, whose texts nobody knows."""
    folder = tmp_path_factory.mktemp("stats")
    for number, (name, n, licence) in enumerate((("wiki", 300, "CC-BY-4.0"), ("laws", 90, "MIT"))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, make_rows(n, number))))
        build(folder / name, BuildOptions(inputs=[folder / f"{name}.jsonl"], fields=Fields(source="from"), validation=0.1,
                                          tokenizer=folder / "wiki" if number else None, vocab_size=320, workers=1,
                                          shard_bytes=6000, about={"licence": licence}))
    export_megatron(folder / "laws", folder / "meg")
    index_folder(folder / "meg", folder / "laws" / "tokenizer.json", validation=["valid*"], licence="MIT")
    return folder


def recount(folder: Path, name: str, split: str = "train") -> list[tuple[str, str, int, int, int]]:
    """(source, language, tokens, bytes, words) of every document of the split; ASCII white space parts words."""
    tokenizer, found = Tokenizer.from_file(str(folder / name / "tokenizer.json")), []
    for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()):
        content = row["text"].encode()
        if (int(hashlib.sha256(content).hexdigest()[:12], 16) / 2**48 < 0.1) is (split == "validation"):
            tokens = len(tokenizer.encode(row["text"], add_special_tokens=False).ids) + 1  # and the end of the document
            found.append((row["from"], CODES[row["lang"]], tokens, len(content), len(content.split())))
    return found


def sums(documents: list[tuple[str, str, int, int, int]]) -> Counts:
    tokens, text_bytes, words = (sum(document[i] for document in documents) for i in (2, 3, 4))
    return Counts(len(documents), tokens, text_bytes, words, tokens)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_bytes_words_and_lengths_are_those_of_the_texts(made: Path, split: str) -> None:
    found, documents = statistics(made / "wiki", split), recount(made, "wiki", split)
    for key, names in ((0, ["s0", "s1", "s2"]), (1, list(CODES.values()))):
        assert found.by(key) == {name: sums([d for d in documents if d[key] == name]) for name in names}
        assert [c.tokens for c in found.by(key).values()] == sorted((c.tokens for c in found.by(key).values()), reverse=True)
    assert found.groups == {group: sums([d for d in documents if d[:2] == group]) for group in {d[:2] for d in documents}}
    lengths = [d[2] for d in documents]
    bins = Counter(math.floor(BINS_PER_OCTAVE * math.log2(n) + 1e-9) for n in lengths)
    assert {b: n for b, n in enumerate(found.lengths.tolist()) if n} == bins and len(bins) > 15
    assert found.length_tokens.tolist() == [
        sum(n for n in lengths if 2 ** (b / 4) <= n < 2 ** ((b + 1) / 4)) for b in range(len(found.length_tokens))]
    for share in (0.1, 0.5, 0.9, 0.99):
        bound = found.quantile_tokens(share)
        assert sum(n <= bound for n in lengths) >= share * len(lengths) > sum(n < bound / 2 ** 0.25 for n in lengths)


def table(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the first printed table of that title, by its first column."""
    rows = dropwhile(lambda cells: cells[:1] != [title], map(str.split, text.splitlines()))
    return {cells[0]: cells[1:] for cells in takewhile(bool, islice(rows, 2, None))}


def test_the_tables_hold_these_numbers(made: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By licence over several data sets too, where bytes and words are those of the texts that are known."""
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["data", "stats", *(str(made / name) for name in ("wiki", "laws", "meg"))]) == 0
    out, laws = capsys.readouterr().out, recount(made, "laws")
    total = sum(d[2] for name in ("wiki", "laws", "laws") for d in recount(made, name))

    def cells(documents: list, known: Counts, of: int) -> list[str]:
        tokens = sum(d[2] for d in documents)
        return [f"{len(documents):,}", f"{tokens:,}", f"{tokens / of:.2%}", f"{known.text_bytes / known.tokens:.3f}",
                f"{known.tokens / known.words:.3f}"]

    wiki = recount(made, "wiki")
    assert table(out, "licence") == {"CC-BY-4.0": cells(wiki, sums(wiki), total), "MIT": cells(laws * 2, sums(laws), total)}
    for title, key in (("source", 0), ("language", 1)):
        first = out[:out.index("laws ")]
        assert table(first, title) == {
            name: cells(here, sums(here), sum(d[2] for d in wiki)) for name in statistics(made / "wiki").by(key)
            for here in [[d for d in wiki if d[key] == name]]}
    assert [cells[-2:] for cells in table(out[out.index("meg "):], "source").values()] == [["-", "-"]]
