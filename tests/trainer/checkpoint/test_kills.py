"""kill -9 of a rank or of all around a save; all 200: python -m officina.benchmarks.checkpoint_faults."""

from officina.benchmarks.checkpoint_faults import kills


def test_a_whole_checkpoint_survives_every_kill(tmp_path):
    found = kills(30, seed=0, folder=tmp_path)
    for mode in ("synchronous", "asynchronous"):
        assert found[mode]["failures"] == [] and found[mode]["whole_checkpoint_loaded"] == 15
    assert sum(r["kills_during_a_save"] for r in found.values()) >= 5  # else the kills prove nothing
