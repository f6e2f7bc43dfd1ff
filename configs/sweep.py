"""Words that stand for several runs, as in Hydra's multirun: `optim.lr=1e-3,1e-4`, `seed=range(0,4)`, `a=choice(b,c)`."""

import itertools
import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from officina.configs.job import split_commas
from officina.trainer.errors import ConfigError, Problem

MOST_RUNS = 1000
"""More than that is a slip; Slurm's own default for an array's size is 1001 (slurm.conf, MaxArraySize)."""


def expand(words: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """[(words of one run, those of them that vary)] of the product of all sweeps, the last word varying fastest.

    A comma outside quotes and brackets makes a sweep; quote a value that has one. Raises ConfigError.
    """
    choices = [_choices(word) for word in words]
    varying = [i for i, found in enumerate(choices) if len(found) > 1]
    total = 1
    for found in choices:
        total *= len(found)
    if total > MOST_RUNS:
        last = words[varying[-1]]
        raise ConfigError([Problem(last.split("=")[0], last.partition("=")[2], f"the sweep has {total:,} runs, and "
                                   f"{MOST_RUNS:,} is the most", choices[varying[-1]][0])], "the sweep")
    return [(list(one), [one[i] for i in varying]) for one in itertools.product(*choices)]


def _choices(word: str) -> list[str]:
    key, sign, value = word.partition("=")
    if not sign or value[:1] in "[{'\"":
        return [word]
    if match := re.fullmatch(r"choice\((.*)\)", value):
        found = split_commas(match[1])
    elif match := re.fullmatch(r"range\((.*)\)", value):
        found = _range(key, value, split_commas(match[1]))
    else:
        found = split_commas(value)
        if len(found) < 2:
            return [word]
    if not found:
        raise ConfigError([Problem(key, value, "names no value to choose from", f"{key}=choice(1,2)")], "the sweep")
    return [f"{key}={one}" for one in found]


def _range(key: str, value: str, parts: list[str]) -> list[str]:
    """As Python's range: from the first, without the last. Exact: 0.1 stays 0.1."""
    try:
        numbers = [Decimal(part) for part in parts]
        start, stop, step = ([Decimal(0), *numbers, Decimal(1)] if len(numbers) == 1 else [*numbers, Decimal(1)])[:3]
        if not 1 <= len(numbers) <= 3 or not step or not all(number.is_finite() for number in numbers):
            raise ValueError
    except (InvalidOperation, ValueError):
        raise ConfigError([Problem(key, value, "is no range of numbers, range(start,stop,step)", f"{key}=range(0,4)")],
                          "the sweep") from None
    count = min(max(int(((stop - start) / step).to_integral_value(ROUND_CEILING)), 0), MOST_RUNS + 1)
    return [str(start + i * step) for i in range(count)]
