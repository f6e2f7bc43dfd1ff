"""Conditions that weights carry: of all data they were trained on, in this run and in those that they come from.

Each start writes into history.jsonl the conditions of the data that it reads from then on (`conditions`), and a run's first
one those of the weights that it begins with, by `init_from`, `adapter.init_from` or as a branch (`carried`). So they are known
where the data, or the run that read it, have been removed since.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from officina.trainer.config import LoraConfig, RunConfig
from officina.trainer.data.ledger import read_ledger
from officina.trainer.data.manifest import Dataset, open_dataset
from officina.trainer.data.order import sources_in_use
from officina.trainer.data.policy import Policy, parse_policy, policy_of
from officina.trainer.errors import DataError, OfficinaError
from officina.trainer.hf.base import Base, open_base
from officina.trainer.run_dir import HISTORY, LEDGER, load_config, read_history

_OF_WEIGHTS = ("licence", "attribution", "export", "personal_data", "sensitive")
"""Fields of a policy that say something of weights too; the others are of reading the data."""


def at_start(run: RunConfig, position: int) -> dict[str, dict[str, Any]]:
    """For history.jsonl: fingerprint and conditions of each source that is read from sample `position` on and is at hand."""
    return {name: {"fingerprint": dataset.manifest.fingerprint, "policy": _told(policy_of(dataset))}
            for name in sources_in_use(run.data, position) if (dataset := _at_hand(run, name))}


def for_history(carried: Mapping[str, Policy]) -> dict[str, dict[str, Any]]:
    """As history.jsonl keeps what `of_begin` or `of_run` found."""
    return {label: _told(policy) for label, policy in carried.items()}


def of_begin(run: RunConfig) -> dict[str, Policy]:
    """Conditions of the weights that a new run begins with, by `SOURCE of RUN@STEP`; none of a folder's, or of what is not
    there."""
    texts = [run.init_from, *([run.adapter.init_from] if isinstance(run.adapter, LoraConfig) else [])]
    found: dict[str, Policy] = {}
    for base in filter(None, map(_opened, texts)):
        _add(found, _of(of_run(base.path, base.step), base.name))
    return found


def of_run(run_dir: Path, step: int | None = None, besides: Collection[str] = ()) -> dict[str, Policy]:
    """Conditions of a run's weights after `step` (none: of its last step), by source of its own or `SOURCE of RUN@STEP`.

    Of a data set that is still in the configuration and at hand, those of today; else those of the start that read it.
    besides: own sources that are not asked for. Raises ConfigError or DataError for a run that cannot be read.
    """
    run, history, where = load_config(run_dir), read_history(run_dir), Path(run_dir) / HISTORY
    known = {(name, facts["fingerprint"]): parse_policy(facts["policy"], where) for start in history
             for name, facts in (start.get("conditions") or {}).items()}
    known = known or dict.fromkeys((name, "") for name in run.data.sources)  # of a version that kept none
    own = {name for name, _ in known} - set(besides)
    read = _sources_read(run_dir, step) & own if own else own
    found: dict[str, Policy] = {}
    for (name, fingerprint), then in reversed(known.items()):
        if name in read and (policy := _today(run, name, fingerprint) or then):
            _add(found, {name: policy})
    carried = next((start["carried"] for start in reversed(history) if start.get("carried") is not None), {})
    _add(found, {label: parse_policy(policy, where) for label, policy in carried.items()})
    return found


def of_branch(run_dir: Path, step: int, besides: Collection[str] = ()) -> dict[str, Policy]:
    """The same for a branch of it, which has not begun."""
    return _of(of_run(run_dir, step, besides), f"{Path(run_dir).resolve().name}@{step}")


def _sources_read(run_dir: Path, step: int | None) -> set[str]:
    if not (Path(run_dir) / LEDGER).is_file():
        return set()  # of a run without a step, or an import
    return {name for entry in read_ledger(run_dir)[0] if step is None or entry.step <= step
            for name, rows in entry.source_rows.items() if rows}


def _opened(text: str) -> Base | None:
    """The run that `init_from` names, if that is one and there is one: what is wrong with it is said elsewhere."""
    with suppress(OfficinaError, OSError):
        base = open_base(text) if text else None
        return None if base is None or base.family else base
    return None


def _at_hand(run: RunConfig, name: str) -> Dataset | None:
    with suppress(DataError):
        return open_dataset(run.data.sources[name].path)
    return None


def _today(run: RunConfig, name: str, fingerprint: str = "") -> Policy | None:
    dataset = _at_hand(run, name) if name in run.data.sources else None
    if dataset is None or (fingerprint and dataset.manifest.fingerprint != fingerprint):
        return None
    with suppress(DataError):
        return policy_of(dataset)
    return None


def _of(found: Mapping[str, Policy], run: str) -> dict[str, Policy]:
    return {label if " of " in label else f"{label} of {run}": policy for label, policy in found.items()}


def _add(found: dict[str, Policy], more: Mapping[str, Policy]) -> None:
    for label, policy in more.items():
        policy = replace(Policy(), **{name: getattr(policy, name) for name in _OF_WEIGHTS})
        while found.get(label, policy) != policy:
            label += " (before)"
        found[label] = policy


def _told(policy: Policy) -> dict[str, Any]:
    """The fields that say something."""
    default = asdict(Policy())
    return {name: value for name, value in asdict(policy).items() if value != default[name]}
