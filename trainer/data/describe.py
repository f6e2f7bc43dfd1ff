"""Changes what is said about a data set, not what is in it: licence, creators, conditions of use.

The fingerprint stays, so that runs on the data go on. dataset.json is replaced last but for croissant.json, which is
derived from it and can be written again.
"""

import hashlib
import json
import re
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from officina.trainer.data.croissant import write_croissant
from officina.trainer.data.manifest import MANIFEST, Manifest, claimed, open_dataset, rewrite_manifest
from officina.trainer.data.odrl import is_odrl, read_odrl
from officina.trainer.data.policy import POLICY, Policy, both, parse_policy, policy_bytes, policy_of, write_policy
from officina.trainer.errors import DataError

CHANGEABLE = ("description", "licence", "creators", "url", "published", "collected", "version")
_MANIFEST = TypeAdapter(Manifest)
_FORMS = {"published": (r"\d{4}-\d\d-\d\d", "2026-11-23"), "collected": (r"\d{4}(-\d\d(-\d\d)?)?", "2025-06"),
          "url": (r"[A-Za-z][\w+.-]*:\S+", "https://example.org/data")}
"""What catalogues read as a date or an address, and an example of it."""


def read_policy_file(path: str | Path, before: Policy | None = None) -> Policy:
    """A policy from a file: an ODRL offer, agreement or set in JSON-LD, or the fields of policy.json.

    A file may hold both: {"odrl": {...}, "licence": [...], ...}. All that either says must hold. before: the policy that it
    replaces; what ODRL has no words for (licence, personal data, sensitive, attribution, pool) stays as it is there.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}. Name a file with an ODRL offer or with the fields of policy.json.") from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not JSON ({exc}). Write an ODRL offer as JSON-LD, or the fields of policy.json.") from exc
    try:
        if is_odrl(document):
            return read_odrl(document, before)
        if isinstance(document, dict) and is_odrl(document.get("odrl")):
            fields = {key: value for key, value in document.items() if key != "odrl"}
            said = parse_policy(fields, path)
            kept = replace(before or Policy(), **{name: getattr(Policy(), name) for name in fields})
            return both(read_odrl(document["odrl"], kept), said)
    except RecursionError as exc:
        raise DataError(f"{path}: is nested too deeply to be conditions of use. State them in a few rules.") from exc
    return parse_policy(document, path)


def policy_before(folder: str | Path) -> Policy | None:
    """What policy.json says as it lies there, bound or not, for `read_policy_file`; none if there is none to be read."""
    try:
        return parse_policy(json.loads((Path(folder) / POLICY).read_bytes()), POLICY)
    except (OSError, ValueError, DataError):
        return None


def change(folder: str | Path, *, policy: Policy | None = None, **said: Any) -> Manifest:
    """Replace fields of dataset.json (of `CHANGEABLE`) and the policy; returns the new manifest.

    Nothing is written before all is checked. Killed between policy.json and dataset.json, it leaves a data set that every
    use refuses until the same change is made again.

    Raises DataError for a field that cannot be changed without building anew, or a value that is none of its kind.
    """
    folder = Path(folder)
    open_dataset(folder)  # raises before anything is written
    with claimed(folder):
        return _change(folder, policy, said)


def _is_date(text: str) -> bool:
    """Is `2025`, `2025-06` or `2025-06-30` a day, or does one begin it?"""
    try:
        date.fromisoformat((text + "-01-01")[:10])
    except ValueError:
        return False
    return True


def _change(folder: Path, policy: Policy | None, said: dict[str, Any]) -> Manifest:
    dataset = open_dataset(folder)
    manifest = dataset.manifest
    if unknown := sorted(set(said) - set(CHANGEABLE)):
        raise DataError(f"{folder}: {', '.join(unknown)} cannot be changed without building the data set again. "
                        f"What can be changed: {', '.join(CHANGEABLE)} and the policy.")
    for name, (form, example) in _FORMS.items():
        if (value := said.get(name)) and not (re.fullmatch(form, value) and (name == "url" or _is_date(value))):
            raise DataError(f"--{name} {value}: is no {'address' if name == 'url' else 'date'}. Try: --{name} {example}")
    if not all(each.strip() for each in said.get("creators", ())):
        raise DataError("--creator: is empty. Give a name, or leave the option out.")
    if policy is None:
        policy_of(dataset)  # raises if it is not the one that is named
    else:
        policy = replace(policy, dataset=f"{manifest.name} {said.get('version', manifest.version)}")
        said["policy_sha256"] = hashlib.sha256(policy_bytes(policy)).hexdigest()
    try:
        changed = _MANIFEST.validate_python(asdict(manifest) | said)
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in exc.errors())
        raise DataError(f"{folder / MANIFEST}: {told}. Try: officina data describe --help") from exc
    if policy is not None:
        write_policy(folder, policy)
    rewrite_manifest(folder, changed)
    write_croissant(folder)
    return changed
