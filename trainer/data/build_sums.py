"""What is told of a finished build: the steps that documents went through, and the sums of stats.json."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from officina.trainer.data.documents import HPLT_STEPS, NO_LANGUAGE, Filter
from officina.trainer.data.manifest import Step
from officina.trainer.data.parts import TRAIN, VALIDATION, Segment
from officina.trainer.data.scan import Scan


def steps_of(scans: Sequence[Scan], duplicates: int, segments: Sequence[Segment], filters: Sequence[Filter]) -> list[Step]:
    """What HPLT's fields, duplicates and filters did, in the order in which documents met them."""
    version, steps = metadata.version("officina"), []
    hplt = {name: sum(found.left_out["steps"].get(name, 0) for found in scans) for name in HPLT_STEPS}
    documents = sum(found.documents for found in scans) + hplt["hplt-filter"] + hplt["hplt-robots"]

    def add(name: str, version: str, left_out: int, changed: int) -> None:
        nonlocal documents
        steps.append(Step(name=name, version=version, documents_in=documents, documents_out=documents - left_out,
                          documents_changed=changed))
        documents -= left_out

    for name, count in hplt.items():
        if count:
            add(name, version, 0 if name == "hplt-pii" else count, count if name == "hplt-pii" else 0)
    add("exact-duplicates", version, duplicates, 0)
    for each in filters:
        counts = [segment.steps.get(each.name, [0, 0]) for segment in segments]
        add(each.name, each.version, sum(c[0] for c in counts), sum(c[1] for c in counts))
    return steps


def stats_of(segments: Sequence[Segment], scans: Sequence[Scan], duplicates: int) -> dict[str, Any]:
    """stats.json: sums per split, and per source and language in it."""
    stats: dict[str, Any] = {}
    names = ("documents", "tokens", "text_bytes", "characters", "words", "segments")
    for split in (TRAIN, VALIDATION):
        groups: dict[tuple[str, str], list[int]] = {}
        for _, source, language, *sums in (g for segment in segments for g in segment.groups if g[0] == split):
            before = groups.get((source, language or NO_LANGUAGE), [0] * len(names))
            groups[source, language or NO_LANGUAGE] = [a + b for a, b in zip(before, sums, strict=True)]
        lengths: dict[int, int] = {}
        for _, bound, n in (entry for segment in segments for entry in segment.lengths if entry[0] == split):
            lengths[bound] = lengths.get(bound, 0) + n
        if groups:
            totals = dict(zip(names, map(sum, zip(*groups.values(), strict=True)), strict=True))
            stats[split] = totals | {
                "bytes_per_token": round(totals["text_bytes"] / totals["tokens"], 4),
                "documents_with_fewer_tokens_than": {str(bound): lengths[bound] for bound in sorted(lengths)},
                "groups": [{"source": source, "language": language} | dict(zip(names, sums, strict=True))
                           for (source, language), sums in sorted(groups.items())]}
    files = [name for found in scans for name in found.left_out["undecodable_files"]]
    return stats | {"left_out": {
        "undecodable": sum(found.left_out["undecodable"] for found in scans), "undecodable_files": files[:100],
        "empty": sum(found.left_out["empty"] for found in scans), "duplicates": duplicates,
        "bad_rows": sum(found.left_out["bad"] for found in scans) + sum(segment.bad for segment in segments)}}
