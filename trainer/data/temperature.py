"""Weights of a mixture from the sizes of its sources, flattened by a temperature.

    weight of a source ~ tokens ** (1 / T)                      data.temperature_over=sources
    weight of a language ~ (tokens of its sources) ** (1 / T)   data.temperature_over=languages; its sources share it by tokens

T = 1 samples in proportion to size, T = 3.33 is mT5's (arXiv:2010.11934), a large T samples all alike. The weights are written
out when a run is planned and the temperature is taken back: a rank, the ledger and the audit see weights as any others, and a
resume keeps them.
"""

from collections.abc import Collection
from dataclasses import replace

from officina.trainer.config import RunConfig
from officina.trainer.data.manifest import Dataset, open_dataset
from officina.trainer.errors import DataError, Problem

_DIGITS = 6


def by_temperature(run: RunConfig, names: Collection[str], weighted: Collection[str] = ()) -> tuple[RunConfig, list[Problem]]:
    """`run` with the weights of the sources `names` written out, and without the temperature; or what stands against it.

    weighted: sources whose weight was asked for as well. A data set that cannot be opened is left to those who look at all.
    """
    temperature = run.data.temperature
    if temperature is None:
        return run, []
    taken = replace(run, data=replace(run.data, temperature=None))
    if weighted:
        name = min(weighted)
        rule = f"makes the weights, but data.sources.{name}.weight is given too"
        return run, [Problem("data.temperature", f"{temperature:g}", rule, "data.temperature=null, or leave the weight out")]
    sizes: dict[str, int] = {}
    groups: dict[str, str] = {}
    for name in sorted(names):
        try:
            dataset = open_dataset(run.data.sources[name].path)
        except DataError:
            return taken, []
        sizes[name] = _size(dataset, run.data.split)
        groups[name] = name
        if run.data.temperature_over == "languages":
            if len(languages := dataset.manifest.languages) != 1:
                rule = f"data.sources.{name} has {len(languages)} languages, and a source is sampled as a whole"
                return run, [Problem("data.temperature_over", "languages", rule,
                                     "data.temperature_over=sources, or a data set for each language")]
            groups[name] = languages[0]
    totals: dict[str, int] = {}
    for name, group in groups.items():
        totals[group] = totals.get(group, 0) + sizes[name]
    flat = {name: totals[group] ** (1 / temperature) * sizes[name] / totals[group]
            for name, group in groups.items() if sizes[name]}
    whole = sum(flat.values())
    weights = {name: max(round(value / whole, _DIGITS), 10.0 ** -_DIGITS) for name, value in flat.items()}
    sources = {name: replace(source, weight=weights.get(name, source.weight)) for name, source in run.data.sources.items()}
    return replace(taken, data=replace(taken.data, sources=sources)), []


def _size(dataset: Dataset, split: str) -> int:
    """Tokens of the split, or records."""
    totals = dataset.manifest.splits.get(split)
    return 0 if totals is None else totals.documents if dataset.manifest.kind == "records" else totals.tokens
