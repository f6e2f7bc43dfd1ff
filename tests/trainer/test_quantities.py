"""Counts and times as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from officina.trainer.quantities import parse_count, parse_duration_s


@pytest.mark.parametrize(("text", "number"), [
    ("0", 0), ("4096", 4096), ("1e9", 10**9), ("10B", 10**10), ("10b", 10**10), ("512k", 512_000), ("512K", 512_000),
    ("4Ki", 4096), ("4ki", 4096), ("2Mi", 2**21), ("1Gi", 2**30), ("1g", 10**9), ("2T", 2 * 10**12), ("1Ti", 2**40),
    ("524_288", 524_288), ("1.5k", 1500), ("0.5Ki", 512), (".5k", 500), ("1.5e3", 1500), ("1e3k", 10**6), (" 7 ", 7),
    ("+7", 7), ("-1", -1), ("1e+3", 1000), (7, 7), (7.0, 7), ("9007199254740993", 9007199254740993),
    ("16.1k", 16_100), ("4.1M", 4_100_000), ("1.001k", 1001), ("9223372036854775807", 2**63 - 1)])
def test_counts(text, number):
    assert parse_count(text) == number and type(parse_count(text)) is int


@pytest.mark.parametrize("text", ["", "ten", "1e", "k", "1kk", "1kib", "0x10", "5%", "1,000", "1 000 k k", "1e3.5",
                                  True, None, "nan", "inf", [1]])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="whole number such as"):
        parse_count(text)


@pytest.mark.parametrize(("text", "near"), [("1.5", "2"), ("0.1", "1"), ("1.0005k", "1000"), ("1e-3", "1")])
def test_a_fraction_is_no_count_and_the_message_says_what_would_be(text, near):
    with pytest.raises(ValueError, match=f"not a whole number; write for example {near}"):
        parse_count(text)


@pytest.mark.parametrize("text", ["1e400", "9223372036854775808", 2**63, f"{'9' * 400}.5", "10000000T"])
def test_a_count_has_a_bound(text):
    with pytest.raises(ValueError, match="at most 2\\*\\*63 - 1"):
        parse_count(text)


@given(st.integers(-10**18, 10**18))
def test_every_whole_number_is_itself(number):
    assert parse_count(str(number)) == parse_count(f"{number:_}") == number


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("90s", 90), ("1.5h", 5400), ("90m", 5400), ("8h", 28_800), ("1h30m", 5400), ("2d", 172_800),
    ("1w", 604_800), ("08:00:00", 28_800), ("8:00:00", 28_800), ("2-00:00:00", 172_800), ("1-12:00", 129_600),
    ("30:00", 1800), ("1:30", 90), (90, 90), (1.5, 1.5), ("1D2H", 93_600)])
def test_times(text, seconds):
    assert parse_duration_s(text) == seconds and type(parse_duration_s(text)) is float


@pytest.mark.parametrize("text", ["", "soon", "1y", "1:2:3:4", "-5m", "8 hours", "h8", "1h-30m", "1-", "1e3s", True, None])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="a time is written"):
        parse_duration_s(text)


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_slurm_reads_the_same_time(days, hours, minutes, seconds):
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration_s(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == expected
    assert parse_duration_s(f"{days}d{hours}h{minutes}m{seconds}s") == expected
