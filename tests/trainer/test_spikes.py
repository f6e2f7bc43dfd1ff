import json
import math
import random
import statistics

from officina.trainer.spikes import MIN_VALUES, SpikeDetector


def fed(detector: SpikeDetector, values: list[float]) -> list[bool]:
    return [detector.observe(v) for v in values]


def noise(n: int, seed: int = 0, mean: float = 2.0, deviation: float = 0.1) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(mean, deviation) for _ in range(n)]


def test_the_bound_is_mean_plus_sigma_deviations_of_the_last_window():
    detector, values = SpikeDetector(window=50, sigma=4.0), noise(200)
    assert not any(fed(detector, values))
    last = values[-50:]
    assert math.isclose(detector.bound(), statistics.fmean(last) + 4 * statistics.pstdev(last), rel_tol=1e-12)


def test_a_spike_is_one_and_its_successor_is_none():
    detector = SpikeDetector(window=128, sigma=6.0)
    fed(detector, noise(128))
    assert fed(detector, [1e6, 2.05, 9.0, 2.0]) == [True, False, True, False], "one must not blind it"


def test_a_lasting_higher_level_is_accepted_in_the_end():
    detector = SpikeDetector(window=64, sigma=4.0)
    fed(detector, noise(64))
    verdicts = fed(detector, noise(64, seed=1, mean=4.0))
    assert verdicts[0] and not any(verdicts[32:])


def test_few_values_zero_sigma_and_flat_stretches_make_no_spike():
    detector = SpikeDetector(window=128, sigma=3.0)
    assert not any(fed(detector, [1.0] * (MIN_VALUES - 1) + [1e9])), "too few values to judge"
    assert detector.bound() < math.inf
    assert not any(fed(SpikeDetector(window=128, sigma=0.0), [1.0] * 200 + [1e9]))
    flat = SpikeDetector(window=128, sigma=3.0)
    assert not any(fed(flat, [1.0] * 200 + [1.0 + 1e-6]))
    assert flat.observe(1.01)
    short = SpikeDetector(window=8, sigma=3.0)
    assert fed(short, [1.0] * 8 + [2.0])[-1], "a short window judges when it is full"


def test_non_finite_values_leave_no_trace():
    one, other = SpikeDetector(window=64, sigma=4.0), SpikeDetector(window=64, sigma=4.0)
    values = noise(100)
    fed(one, values)
    assert not any(fed(other, [x for v in values for x in (v, math.nan, math.inf, -math.inf)])[1::4])
    assert one.bound() == other.bound()


def test_a_resumed_detector_gives_the_same_bits():
    values = noise(300)
    whole, first, second = (SpikeDetector(window=128, sigma=2.0) for _ in range(3))
    bounds = [(whole.observe(v), whole.bound()) for v in values]
    fed(first, values[:150])
    second.load(json.loads(json.dumps(first.state())))
    assert [(second.observe(v), second.bound()) for v in values[150:]] == bounds[150:]


def test_a_window_changed_at_the_resume_keeps_the_newest():
    old, new = SpikeDetector(window=128, sigma=2.0), SpikeDetector(window=4, sigma=2.0)
    fed(old, [float(v) for v in range(100)])
    new.load(old.state())
    assert new.state() == {"values": [96.0, 97.0, 98.0, 99.0]}
