"""Quantities as people write them: `1e9`, `10B`, `512k` for counts; `90m`, `8h`, `2-00:00:00` for times."""

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

MAX_COUNT = 2**63 - 1
_COUNT_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12,
                 "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TIME_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_count(value: object) -> object:
    """Whole number from `4096`, `1e9`, `10B`, `512k`, `4Ki`, `524_288`; anything else raises ValueError.

    Suffixes k, M, B (or G), T are powers of ten; Ki, Mi, Gi, Ti are powers of two; case does not matter.
    """
    if isinstance(value, bool):
        raise ValueError("a count is a whole number such as 4096, 1e9, 10B or 512k")
    if isinstance(value, int):
        return _bounded(value)
    text = str(value).strip().replace("_", "").lower()
    match = re.fullmatch(r"([+-]?[0-9]*\.?[0-9]+(?:e[+-]?[0-9]{1,3})?)\s*([kmbgt]i?)?", text)
    if not match or (match[2] or "") not in _COUNT_SUFFIX:
        raise ValueError("a count is a whole number such as 4096, 1e9, 10B or 512k")
    exact = Fraction(match[1]) * _COUNT_SUFFIX[match[2] or ""]  # in binary floats, 4.1M would be no whole number
    if _bounded(exact).denominator != 1:
        raise ValueError(f"{value} is {float(exact):g}, not a whole number; write for example {round(exact) or 1}")
    return int(exact)


def _bounded(count: int | Fraction) -> int | Fraction:
    if abs(count) > MAX_COUNT:
        raise ValueError(f"a count is at most 2**63 - 1, {MAX_COUNT}")
    return count


def parse_duration_s(value: object) -> object:
    """Seconds from `90`, `90s`, `90m`, `8h`, `1h30m`, `08:00:00`, `2-00:00:00` (Slurm's days-hours:minutes:seconds)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip().lower()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    if match := re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-9]{1,2})(?::([0-9]{1,2}))?", text):
        days, first, second, third = match.groups()
        if third is None and days is None:  # as Slurm reads it: minutes:seconds
            return float(int(first) * 60 + int(second))
        return float(int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + int(third or 0))
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a time is written 90s, 90m, 8h, 1h30m, 08:00:00 or 2-00:00:00")
    return float(sum(float(number) * _TIME_UNIT_S[unit] for number, unit in parts))


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number of things: tokens, steps, rows."""
Duration = Annotated[float, BeforeValidator(parse_duration_s)]
"""A time in seconds."""
