"""What a checkpoint keeps of the loader: one position, and what tells whether it means the same later.

How many rows each source has given follows from position and timeline in closed form, so one checksum stands for them all. Of
each source that has given rows there are six bytes, in the order of their names: four of its data's fingerprint, two of how its
documents are packed. 400 sources fit in 4 KiB.
"""

import base64
from collections.abc import Mapping
from typing import Any

import xxhash

from officina.trainer.config import RunConfig
from officina.trainer.data.reader import RowReader
from officina.trainer.errors import DataError

VERSION = 2
_DATA = slice(0, 4)
_UNKNOWN = bytes(6)


def make_state(run: RunConfig, reader: RowReader, position: int, earlier: Mapping[str, bytes]) -> dict[str, Any]:
    """The state at a position, JSON-ready. earlier: six bytes of each source that gave rows and is not open any more."""
    rows = reader.order.mixture.rows_given(position)
    marks = [_mark(reader.fingerprints[name], reader.packing.get(name, "")) if name in reader.fingerprints
             else earlier.get(name, _UNKNOWN) for name in rows]
    return {"version": VERSION, "position": position, "seed": run.seed, "seq_len": reader.seq_len,
            "shuffle": int(run.data.shuffle), "shuffle_block": run.data.shuffle_block, "split": run.data.split,
            "rows": _checksum(rows), "sources": base64.b64encode(b"".join(marks)).decode()}


def check_state(run: RunConfig, reader: RowReader, position: int, state: dict[str, Any]) -> dict[str, bytes]:
    """Raise DataError unless a loader at `position` goes on exactly where the one with `state` stopped.

    Returns what `make_state` needs of the sources that are not open any more.
    """
    state = state if "version" in state else _from_version_1(state)
    if state["version"] != VERSION:
        raise DataError(f"the checkpoint's data state has version {state['version']}, this officina reads 1 and {VERSION}. "
                        "Update officina.")
    mine = make_state(run, reader, position, {})
    for key, remedy in (("position", "open the loader at the checkpoint's position"),
                        ("seed", "seed={}"), ("seq_len", "batch.seq_len={}"), ("split", "data.split={}"),
                        ("shuffle", "data.shuffle={}"), ("shuffle_block", "data.shuffle_block={}")):
        if mine[key] != state[key]:
            raise DataError(f"{key}={mine[key]}: the checkpoint's data order has {key}={state[key]}, "
                            f"and another order would repeat and lose samples. Try: {remedy.format(state[key])}")
    rows = reader.order.mixture.rows_given(position)
    if mine["rows"] != state["rows"]:
        raise DataError(f"data.timeline: at sample {position} it counts rows {rows}, but the checkpoint read others. "
                        "Change the mixture with `officina resume`, which keeps what was read; "
                        "do not edit weights in config.yaml.")
    marks = base64.b64decode(state["sources"])
    then = {name: marks[6 * i:6 * i + 6] for i, name in enumerate(rows)}
    for name in sorted(then.keys() & reader.fingerprints.keys()):
        _check_source(run, name, reader.fingerprints[name], reader.packing.get(name, ""), then[name])
    return {name: mark for name, mark in then.items() if name not in reader.fingerprints}


def _check_source(run: RunConfig, name: str, fingerprint: str, plan: str, then: bytes) -> None:
    now = _mark(fingerprint, plan)
    if then in (now, _UNKNOWN):
        return
    if then[_DATA] != now[_DATA]:
        raise DataError(
            f"data.sources.{name}: the data set at {run.data.sources[name].path} has fingerprint {fingerprint}, "
            f"but the checkpoint was trained on {then[_DATA].hex()}... Give data.sources.{name}.path=DIR with the old data; "
            "new data may join under a new name: data.sources.NEW.path=DIR.")
    if plan and then == _mark(fingerprint, ""):
        raise DataError(f"data.sources.{name}: data.packing=best_fit, but the checkpoint was trained on rows cut from the "
                        "stream, and another order would repeat and lose tokens. Try: data.packing=cut")
    raise DataError(f"data.sources.{name}: is {f'packed by plan {plan}' if plan else 'cut into rows'}, but the checkpoint was "
                    "trained by another plan. Give the data.packing, data.overlong and batch.seq_len of the run's config.yaml.")


def _mark(fingerprint: str, plan: str) -> bytes:
    """Six bytes of a source, from two numbers in hexadecimal digits; those of rows that are cut, plan "", end in zeros."""
    return bytes.fromhex(fingerprint[:8] + plan[:4]).ljust(6, b"\0")


def _checksum(rows: Mapping[str, int]) -> str:
    return xxhash.xxh3_64_hexdigest("\n".join(f"{name}={rows[name]}" for name in sorted(rows)).encode())


def _from_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """A state that named each source with its rows, fingerprint and plan."""
    rows = {name: int(n) for name, n in sorted(state["cursors"].items()) if n}
    marks = [_mark(state["fingerprints"].get(name, ""), state.get("packing", {}).get(name, "")) for name in rows]
    return {"shuffle_block": 1} | state | {"version": VERSION, "rows": _checksum(rows),
                                           "sources": base64.b64encode(b"".join(marks)).decode()}
