"""Checks the description of a data set where Croissant's own validator is lenient.

mlcroissant 1.1 warns of a missing licence, takes any words for a policy and never looks at a hash until it downloads.
Here a missing licence, a policy that is not understood or not the one named, and a wrong hash are faults.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from officina.trainer.data.croissant import CONFORMS_TO, CROISSANT, describe, licence_url
from officina.trainer.data.jsonld import as_list, local
from officina.trainer.data.manifest import Dataset
from officina.trainer.data.odrl import is_odrl, read_odrl
from officina.trainer.data.policy import Policy, begins, ends, policy_of
from officina.trainer.errors import DataError

MOST_FILES = 20
"""FileObjects of a croissant.json: shards stand in a FileSet."""
STATED = ("name", "version", "description", "creator", "url", "datePublished", "inLanguage", "prov:wasDerivedFrom")
"""What a croissant.json says and dataset.json alone."""


@dataclass(frozen=True, slots=True)
class Described:
    """What `strict` found."""

    faults: list[str]
    missing: list[str]
    """What Croissant and catalogues ask for and nobody has stated; no fault."""


def strict(dataset: Dataset) -> Described:
    """Judge licence, conditions and croissant.json of an open data set."""
    manifest, faults = dataset.manifest, []
    try:
        policy = policy_of(dataset)
    except DataError as exc:
        policy, faults = None, [str(exc)]
    if policy is not None:
        faults += _policy_faults(dataset.folder, policy)
    faults += _croissant_faults(dataset, policy)
    missing = [name for name in ("description", "creators", "url", "published", "collected") if not getattr(manifest, name)]
    return Described(faults, missing)


def _policy_faults(folder: Path, policy: Policy) -> list[str]:
    faults = []
    if not policy.licence:
        faults.append(f"{folder}: no licence is stated, so that nobody may use the data. State the SPDX identifier, or the "
                      f"name of the agreement: officina data describe {folder} --licence CC-BY-4.0")
    if policy.unknown:
        faults.append(f"{folder}: the policy has rules that are not understood and refuse every use: "
                      f"{'; '.join(policy.unknown)}. State them in known terms: officina data describe {folder} --policy FILE")
    if policy.not_before and policy.not_after and begins(policy.not_before) >= ends(policy.not_after):
        faults.append(f"{folder}: the policy allows use from {policy.not_before} until {policy.not_after}, which is never. "
                      f"Mend it: officina data describe {folder} --policy FILE")
    return faults


def _croissant_faults(dataset: Dataset, policy: Policy | None) -> list[str]:
    path = dataset.folder / CROISSANT
    again = f"Write it anew: officina data export {dataset.folder} --to croissant"
    try:
        document = json.loads(path.read_bytes())
    except OSError:
        return [f"{path}: missing. {again}"]
    except (ValueError, RecursionError) as exc:
        return [f"{path}: not JSON ({exc}). {again}"]
    if not isinstance(document, dict):
        return [f"{path}: holds no object. {again}"]
    told = []
    if CONFORMS_TO[0] not in as_list(document.get("conformsTo")):
        told.append(f"conformsTo={document.get('conformsTo')!r} does not name {CONFORMS_TO[0]}")
    expected = describe(dataset, policy or Policy())
    told += [f"{key}={document.get(key)!r}, but dataset.json says {expected.get(key)!r}" for key in STATED
             if document.get(key) != expected.get(key)]
    if policy is not None:
        if document.get(key := "rai:personalSensitiveInformation") != expected[key]:
            told.append(f"{key}={document.get(key)!r}, but the conditions of use say {expected[key]!r}")
        wanted = {licence_url(name) for name in policy.licence}
        if set(map(str, as_list(document.get("license")))) != wanted:
            told.append(f"license={document.get('license')!r}, but the conditions of use say {sorted(wanted)!r}")
        told += _usage_faults(document.get("usageInfo"), policy)
    told += _file_faults(dataset.folder, as_list(document.get("distribution")))
    return [f"{path}: {fault}. {again}" for fault in told]


def _usage_faults(usage: Any, policy: Policy) -> list[str]:
    """What usageInfo permits must be what policy.json permits."""
    if not is_odrl(usage):
        return [f"usageInfo={usage!r} is no odrl:Offer"]
    rules = {key: value for key, value in usage.items() if local(key) != "not-understood"}
    said = read_odrl(rules, policy)
    if said.unknown:
        return [f"usageInfo has a rule that is not understood: {text}" for text in said.unknown]
    differing = [name for name in Policy.__dataclass_fields__ if name not in ("odrl", "unknown")
                 and getattr(said, name) != getattr(replace(policy, unknown=()), name)]
    return [f"usageInfo says {name}={getattr(said, name)!r}, but the conditions of use say {getattr(policy, name)!r}"
            for name in differing]


def _file_faults(folder: Path, distribution: list[Any]) -> list[str]:
    files = [item for item in distribution if isinstance(item, dict) and local(str(item.get("@type"))) == "cr:FileObject"]
    told = []
    if len(files) > MOST_FILES:
        told.append(f"lists {len(files)} files, at most {MOST_FILES} make sense there: list shards in shards.jsonl")
    if not files:
        told.append("lists no file with its sha256")
    for item in files:
        name = str(item.get("contentUrl"))
        target = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            told.append(f"contentUrl={name!r} leaves the data set's folder")
        elif not target.is_file():
            told.append(f"lists {name}, which is not there")
        elif (found := hashlib.sha256(target.read_bytes()).hexdigest()) != item.get("sha256"):
            told.append(f"says sha256 {item.get('sha256')} of {name}, which has {found}")
    return told
