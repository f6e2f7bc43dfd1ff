"""Conditions that weights carry: of all data they were trained on, in this run and in those that they come from.

Each start writes into history.jsonl the conditions of the data that it reads from then on (`conditions`), and one that begins
the run those of the weights it begins with, by `init_from`, `adapter.init_from` or as a branch (`carried`). An export has them
in data_conditions.json. So they are known where the data, or the run that read them, have been removed since.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from officina.trainer.config import LoraConfig, RunConfig
from officina.trainer.data.ledger import read_ledger
from officina.trainer.data.manifest import Dataset, open_dataset
from officina.trainer.data.order import sources_in_use
from officina.trainer.data.policy import Policy, parse_policy, policy_of
from officina.trainer.errors import DataError, OfficinaError
from officina.trainer.hf.base import open_base
from officina.trainer.run_dir import HISTORY, LEDGER, committed_steps, load_config, read_history

FILE = "data_conditions.json"
"""In an exported model or adapter."""
_OF_WEIGHTS = ("licence", "attribution", "export", "personal_data", "sensitive")
"""Fields of a policy that say something of weights too; the others are of reading the data."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one data set."""

    fingerprint: str
    policy: Policy


Found = dict[str, Known]
"""By source of the run itself, or `SOURCE of RUN@STEP`."""


def source_of(label: str) -> str:
    """The name that the run which read the data has for it."""
    return label.partition(" of ")[0].removesuffix(" (before)")


def at_start(run: RunConfig, position: int) -> dict[str, Any]:
    """For history.jsonl: the conditions of each source that is read from sample `position` on and is at hand."""
    return record({name: Known(dataset.manifest.fingerprint, policy_of(dataset))
                   for name in sources_in_use(run.data, position) if (dataset := _at_hand(run, name))})


def of_begin(run: RunConfig) -> Found:
    """Conditions of the weights that a new run begins with. What is wrong with these is said elsewhere."""
    found: Found = {}
    for text in (run.init_from, run.adapter.init_from if isinstance(run.adapter, LoraConfig) else ""):
        base = None
        with suppress(OfficinaError, OSError):
            base = open_base(text) if text else None
        if base is not None:
            _add(found, read_file(base.path) if base.family else _of(of_run(base.path, base.step), base.name))
    return found


def of_branch(run_dir: Path, step: int) -> Found:
    """The same of a branch that begins at this step of a run."""
    return _of(of_run(run_dir, step), f"{Path(run_dir).resolve().name}@{step}")


def of_run(run_dir: Path, step: int | None = None) -> Found:
    """Conditions of a run's weights after `step`; none: at its newest checkpoint.

    Of data sets in the run's configuration that are at hand, under the same name, those of today; of others as the history has
    them. Raises ConfigError or DataError for a run that cannot be read.
    """
    run, where = load_config(run_dir), Path(run_dir) / HISTORY
    at_hand = {name: dataset for name in run.data.sources if (dataset := _at_hand(run, name))}
    today = {(name, dataset.manifest.fingerprint): policy for name, dataset in at_hand.items() if (policy := _policy(dataset))}
    begun, standing = _starts(run_dir)
    own: dict[tuple[str, str], Policy] = {}
    for start in reversed(standing):
        for name, known in _parse(start.get("conditions") or {}, where).items():
            own.setdefault((name, known.fingerprint), known.policy)
    told = {name for name, _ in own}  # by none of a version that kept no conditions
    own |= {key: policy for key, policy in today.items() if key[0] not in told}
    read = _sources_read(run_dir, {name for name, _ in own}, max(committed_steps(run_dir), default=0) if step is None else step)
    kept = next((start["carried"] for start in reversed(begun) if start.get("carried") is not None), None)
    found: Found = {}
    for name, fingerprint in own:
        if name in read:
            _add(found, {name: Known(fingerprint, own[name, fingerprint])})
    _add(found, of_begin(run) if kept is None else _parse(kept, where))
    return {label: replace(known, policy=_of_weights(today.get((source_of(label), known.fingerprint), known.policy)))
            for label, known in found.items()}


def record(found: Mapping[str, Known]) -> dict[str, Any]:
    """As JSON: of each policy the fields that say something."""
    default = asdict(Policy())
    return {label: {"fingerprint": known.fingerprint,
                    "policy": {key: value for key, value in asdict(known.policy).items() if value != default[key]}}
            for label, known in found.items()}


def write_file(folder: Path, run_dir: Path, step: int) -> None:
    """Leave the conditions of a run's weights beside their export."""
    if found := of_branch(run_dir, step):
        (folder / FILE).write_text(json.dumps(record(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_file(folder: Path) -> Found:
    """What an export says; nothing for a folder of other making."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as exc:
        raise DataError(f"{path}: not JSON ({exc}). Restore the file from a copy.") from exc
    return _parse(values, path)


def is_recorded(run_dir: Path) -> bool:
    """Does the run's history say what its first weights carried?"""
    return any(start.get("carried") is not None for start in read_history(run_dir))


def _starts(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The starts since the run was begun (a folder can hold a false start before), and those of them that trained what stands:
    a later one takes back what lies behind the step that it goes on from."""
    begun: list[dict[str, Any]] = []
    standing: list[dict[str, Any]] = []
    for start in read_history(run_dir):
        if start.get("action") != "resume":
            begun, standing = [], []
        begun.append(start)
        standing = [each for each in standing if each.get("step", 0) < start.get("step", 0)] + [start]
    return begun, standing


def _sources_read(run_dir: Path, names: set[str], step: int) -> set[str]:
    """Which of these gave rows to the steps until `step`; all of them where no ledger says."""
    if not names or not step:
        return set()
    if not (Path(run_dir) / LEDGER).is_file():
        return names
    return {name for entry in read_ledger(run_dir)[0] if entry.step <= step for name, rows in entry.source_rows.items() if rows}


def _at_hand(run: RunConfig, name: str) -> Dataset | None:
    with suppress(DataError):
        return open_dataset(run.data.sources[name].path)
    return None


def _policy(dataset: Dataset) -> Policy | None:
    with suppress(DataError):
        return policy_of(dataset)
    return None


def _of_weights(policy: Policy) -> Policy:
    return replace(Policy(), **{name: getattr(policy, name) for name in _OF_WEIGHTS})


def _of(found: Found, run: str) -> Found:
    return {label if " of " in label else f"{label} of {run}": known for label, known in found.items()}


def _add(found: Found, more: Found) -> None:
    for label, known in more.items():
        while found.get(label, known) != known:
            label += " (before)"
        found[label] = known


def _parse(values: Mapping[str, Any], where: Path) -> Found:
    try:
        return {label: Known(known["fingerprint"], parse_policy(known["policy"], where)) for label, known in values.items()}
    except (AttributeError, KeyError, TypeError) as exc:
        raise DataError(f"{where}: no conditions of data ({type(exc).__name__}: {exc}). Restore the file from a copy.") from exc
