"""What a data set consists of: documents and tokens by source and language, counted in the shards; words and bytes of the
texts, as the build noted them; the lengths of documents, as numbers and as a picture."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from officina.trainer.data.documents import NO_LANGUAGE
from officina.trainer.data.manifest import STATS, Dataset
from officina.trainer.data.remote import open_whole
from officina.trainer.data.removal import removed_documents
from officina.trainer.data.shards import Shard
from officina.trainer.errors import DataError

BINS_PER_OCTAVE = 4
_OCTAVES = 40


@dataclass(slots=True)
class Counts:
    """Sums over some documents."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """0 where the build did not note it."""
    words: int = 0
    noted_tokens: int = 0
    """Tokens of the documents whose bytes and words were noted."""

    def add(self, other: "Counts") -> None:
        """Count these documents too."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text; the end of each document counts as a token."""
        return self.text_bytes / self.noted_tokens if self.text_bytes else None

    @property
    def tokens_per_word(self) -> float | None:
        """The tokenizer's fertility; a word is what stands between ASCII white space."""
        return self.noted_tokens / self.words if self.words else None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one split of a data set."""

    dataset: Dataset
    groups: dict[tuple[str, str], Counts]
    """(source, language) -> sums."""
    removed: int
    """Documents that were removed on request; they are counted in `groups`."""
    lengths: np.ndarray
    """(bins,) documents by length; bin b holds 2**(b / BINS_PER_OCTAVE) tokens and more."""
    length_tokens: np.ndarray
    """(bins,) tokens of these documents."""

    def by(self, key: int) -> dict[str, Counts]:
        """Sums by source (0) or language (1), the most tokens first."""
        found: dict[str, Counts] = {}
        for names, counts in self.groups.items():
            total = found.setdefault(names[key], Counts())
            total.add(counts)
        return dict(sorted(found.items(), key=lambda item: -item[1].tokens))

    def quantile_tokens(self, share: float) -> float:
        """Length that this share of the documents does not exceed, to a quarter of an octave."""
        reached = np.searchsorted(np.cumsum(self.lengths), share * self.lengths.sum())
        return 2 ** ((int(reached) + 1) / BINS_PER_OCTAVE)


def statistics(folder: str | Path, split: str = "train") -> Statistics:
    """Count the split's documents. Raises DataError if there is no such split."""
    dataset = open_whole(folder)
    entries = dataset.of_split(split)
    if not entries:
        raise DataError(f"{folder}: has no split {split}, only {sorted(dataset.manifest.splits)}. "
                        f"Try: --split {min(dataset.manifest.splits, default='train')}")
    sources, languages = dataset.manifest.sources or ["-"], dataset.manifest.languages or [NO_LANGUAGE]
    documents = np.zeros((len(sources), len(languages)), np.int64)
    tokens, edges = np.zeros_like(documents), 2.0 ** (np.arange(_OCTAVES * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)
    lengths, length_tokens = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1, np.int64)
    removed, gone = 0, removed_documents(dataset)
    for entry in entries:
        shard = Shard(dataset.folder / entry.path, entry)
        n = np.diff(shard.ends, prepend=0)
        language = shard.language_ids if len(shard.language_ids) else np.zeros(len(n), np.int64)
        source = np.minimum(shard.source_ids, len(sources) - 1)
        np.add.at(documents, (source, language), 1)
        np.add.at(tokens, (source, language), n)
        bins = np.searchsorted(edges, n, side="right") - 1
        lengths += np.bincount(bins, minlength=len(lengths))
        length_tokens += np.bincount(bins, n, len(lengths)).astype(np.int64)
        removed += len(gone.get(entry.path, ()))
    groups = {(sources[i], languages[j]): Counts(int(documents[i, j]), int(tokens[i, j]))
              for i, j in zip(*np.nonzero(documents), strict=True)}
    for noted in _noted(dataset, split):
        counts = groups.get((noted["source"], noted["language"]))
        if counts is not None:
            counts.text_bytes, counts.words, counts.noted_tokens = noted["text_bytes"], noted["words"], counts.tokens
    return Statistics(dataset, groups, removed, lengths, length_tokens)


def _noted(dataset: Dataset, split: str) -> list[dict]:
    """What the build noted of the split's texts; older builds did not."""
    path = dataset.folder / STATS
    return json.loads(path.read_bytes()).get(split, {}).get("groups", []) if path.exists() else []


def draw_lengths(found: Statistics, path: str | Path) -> None:
    """The histogram of lengths as a PNG: share of the documents, and of the tokens, by the length of the document."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = 2.0 ** (np.arange(len(found.lengths) + 1) / BINS_PER_OCTAVE)
    for counts, label, colour in ((found.lengths, "documents", "#2a6f97"), (found.length_tokens, "tokens", "#e07a1f")):
        shares = 100 * counts / counts.sum()
        axes.stairs(shares, edges, fill=True, alpha=0.3, color=colour)
        axes.stairs(shares, edges, color=colour, linewidth=1.5, label=f"share of the {label}")
    held = np.flatnonzero(found.lengths)
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[held[0]], edges[held[-1] + 1])
    ticks = 2.0 ** np.arange(np.floor(np.log2(edges[held[0]])), np.ceil(np.log2(edges[held[-1] + 1])) + 1)
    axes.set_xticks(ticks, [f"{t:,.0f}" if t < 1000 else f"{t / 1024:,.0f}k" for t in ticks])
    axes.set_ylim(0)
    axes.set_xlabel("length of the document in tokens")
    axes.set_ylabel("share per quarter of an octave, %")
    total = int(found.lengths.sum())
    axes.set_title(f"{found.dataset.manifest.name}: {total:,} documents, {int(found.length_tokens.sum()):,} tokens",
                   loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
