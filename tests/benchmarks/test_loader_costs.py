"""The loader's costs reach into the loader: what they touch there must be there. Tiny data; no figure is looked at."""

from officina.benchmarks.loader_costs import verification
from officina.benchmarks.loader_data import write_tokens
from officina.trainer.data.shards import GRANULE_BYTES, Shard


def test_verification_meets_every_block_in_the_first_epoch_and_none_in_the_other(tmp_path, monkeypatch):
    n_bytes = 4 * write_tokens(tmp_path, 200_000)
    checked: list[int] = []
    check = Shard._check_granule
    monkeypatch.setattr(Shard, "_check_granule", lambda self, block: checked.append(block) or check(self, block))
    found = verification(tmp_path, 1)  # two turns of both epochs
    assert set(found) == {"first epoch", "verified before", "slower", "of_time"}
    assert sorted(checked) == sorted(2 * [*range(-(-n_bytes // GRANULE_BYTES))])
