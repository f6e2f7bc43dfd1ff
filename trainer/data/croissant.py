"""croissant.json: the data set in Croissant 1.1 with RAI 1.0, for catalogues and for people who do not have officina.

Derived from dataset.json, policy.json and the files beside them, so that the same data set gives the same bytes. The
shards stand in it as one FileSet; their list is shards.jsonl, since validators take seconds for thousands of files.
Source: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from officina.trainer.data.jsonld import NAMESPACE, OWN
from officina.trainer.data.manifest import SHARDS, STATS, TOKENIZER, Dataset, open_dataset, write_whole
from officina.trainer.data.odrl import to_odrl
from officina.trainer.data.policy import POLICY, Policy, policy_of

CROISSANT = "croissant.json"
CONFORMS_TO = ("http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0")
FILES = (SHARDS, STATS, TOKENIZER, POLICY)
"""Files that are listed with their hashes, those that there are. Not dataset.json, which a removal request changes."""
_TERMS = ("citeAs column dataType equivalentProperty examples extract field fileProperty fileObject fileSet format includes "
          "isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
          "separator source subField transform arrayShape containedIn").split()
_CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    **{name: f"cr:{name}" for name in _TERMS},
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"}, "description": {"@container": "@language"},
    "name": {"@container": "@language"}, "odrl": NAMESPACE, "prov": "http://www.w3.org/ns/prov#",
    "xsd": "http://www.w3.org/2001/XMLSchema#", "officina": OWN,
}
_ENCODING = {".json": "application/json", ".jsonl": "application/jsonlines"}
_PERSONAL = {"none": "The provider states that it holds no personal data.",
             "pseudonymised": "Holds pseudonymised personal data.", "present": "Holds personal data."}


def write_croissant(folder: str | Path) -> Path:
    """Write FOLDER/croissant.json from what stands in the folder; returns its path.

    Raises DataError if the folder is no data set or its policy is not the one that dataset.json names.
    """
    dataset = open_dataset(folder)
    path = dataset.folder / CROISSANT
    write_whole(path, (json.dumps(describe(dataset, policy_of(dataset)), indent=1, ensure_ascii=False) + "\n").encode())
    return path


def describe(dataset: Dataset, policy: Policy) -> dict[str, Any]:
    """The content of croissant.json."""
    manifest = dataset.manifest
    licences = [licence_url(name) for name in policy.licence]
    stated = {
        "description": manifest.description, "license": licences[0] if len(licences) == 1 else licences, "url": manifest.url,
        "creator": [{"@type": "sc:Organization", "name": name} for name in manifest.creators],
        "datePublished": manifest.published, "inLanguage": list(manifest.languages),
    }
    document = {
        "@context": _CONTEXT, "@type": "sc:Dataset", "conformsTo": list(CONFORMS_TO), "name": manifest.name,
        "version": manifest.version, **{key: value for key, value in stated.items() if value}, "isLiveDataset": False,
        "distribution": [*_files(dataset), _shards(dataset)],
        "usageInfo": usage_info(policy),
        "prov:wasGeneratedBy": _activity(dataset),
        "rai:personalSensitiveInformation": [_PERSONAL[policy.personal_data]] + ["Sensitive."] * policy.sensitive,
    }
    if manifest.creators:
        document["prov:wasAttributedTo"] = [{"@type": "prov:Agent", "prov:label": name} for name in manifest.creators]
    if manifest.sources:
        document["prov:wasDerivedFrom"] = [{"@type": "prov:Entity", "prov:label": name} for name in manifest.sources]
    if manifest.collected:
        document["rai:dataCollection"] = f"The newest of the data was collected by {manifest.collected}."
    steps = [f"{key}: {_plain(value)}" for key, value in manifest.provenance.items()]
    steps += [f"{step.name} {step.version}: {step.documents_in} documents in, {step.documents_out} out, "
              f"{step.documents_changed} changed" for step in manifest.steps]
    if steps:
        document["rai:dataPreprocessingProtocol"] = steps
    if policy.attribution:
        document["citeAs"] = policy.attribution
    if policy.synthetic:
        document["rai:machineAnnotationTools"] = ["The text was made by a model."]
    return document


def usage_info(policy: Policy) -> dict[str, Any]:
    """The policy as Croissant's usageInfo."""
    return to_odrl(policy) | {"@type": ["CreativeWork", "odrl:Offer"]}


def licence_url(name: str) -> str:
    """The address of an SPDX licence; any other text as it is."""
    plain = all(character.isalnum() or character in ".-+" for character in name) and any(c.isdigit() for c in name)
    return f"https://spdx.org/licenses/{name}.html" if plain else name


def _files(dataset: Dataset) -> list[dict[str, Any]]:
    found = []
    for name in FILES:
        path = dataset.folder / name
        if path.is_file():
            content = path.read_bytes()
            found.append({"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name,
                          "contentSize": f"{len(content)} B", "encodingFormat": _ENCODING[path.suffix],
                          "sha256": hashlib.sha256(content).hexdigest()})
    return found


def _shards(dataset: Dataset) -> dict[str, Any]:
    unit = "token ids" if dataset.manifest.kind == "tokens" else "records"
    files = "shards/*.dls" if all(shard.kind == "dls" for shard in dataset.shards) else "**/*.bin"
    return {"@type": "cr:FileSet", "@id": "shards", "name": "shards", "encodingFormat": "application/octet-stream",
            "includes": files, "description": f"{len(dataset.shards)} shards of {unit}; {SHARDS} lists each with its "
            "sha256, and dataset.json binds that list."}


def _activity(dataset: Dataset) -> dict[str, Any]:
    made = {f"officina:{key}": _plain(value) for key, value in dataset.manifest.provenance.items()}
    return {"@type": "prov:Activity", "prov:label": "officina data build", **made,
            "officina:fingerprint": dataset.manifest.fingerprint}


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
