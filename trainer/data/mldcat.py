"""mldcat.jsonld: the data set for European catalogues, in MLDCAT-AP 3.1.0 ("MLDCAT-AP for AI Factories").

Each object has the class that the profile's shapes ask for, also where it is only an address. Names are written with
their prefixes, so that nothing has to be fetched to read it. Source: https://semiceu.github.io/MLDCAT-AP/releases/3.1.0/
"""

import json
import re
from pathlib import Path
from typing import Any

from officina.trainer.data.croissant import licence_url
from officina.trainer.data.jsonld import NAMESPACE, OWN
from officina.trainer.data.manifest import SHARDS, Dataset, open_dataset, write_whole
from officina.trainer.data.odrl import to_odrl
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.errors import DataError

MLDCAT = "mldcat.jsonld"
_EU = "http://publications.europa.eu/resource/authority/"
_CONTEXT = {
    "adms": "http://www.w3.org/ns/adms#", "dcat": "http://www.w3.org/ns/dcat#", "dct": "http://purl.org/dc/terms/",
    "dpv": "https://w3id.org/dpv#", "dqv": "http://www.w3.org/ns/dqv#", "foaf": "http://xmlns.com/foaf/0.1/",
    "it6": "http://data.europa.eu/it6/", "odrl": NAMESPACE, "officina": OWN, "prov": "http://www.w3.org/ns/prov#",
    "skos": "http://www.w3.org/2004/02/skos/core#", "spdx": "http://spdx.org/rdf/terms#",
    "xsd": "http://www.w3.org/2001/XMLSchema#",
}
_DPV = {"none": "NonPersonalData", "pseudonymised": "PseudonymisedData", "present": "PersonalData"}
_TYPES = {4: "xsd:gYear", 7: "xsd:gYearMonth", 10: "xsd:date"}


def write_mldcat(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the description to OUT (default: FOLDER/mldcat.jsonld); returns its path.

    Raises DataError if something is not stated that the profile makes mandatory.
    """
    dataset = open_dataset(folder)
    path = Path(out) if out else dataset.folder / MLDCAT
    content = json.dumps(describe(dataset, policy_of(dataset)), indent=1, ensure_ascii=False) + "\n"
    try:
        write_whole(path, content.encode())
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}. Name a file that you may write: --out FILE") from exc
    return path


def describe(dataset: Dataset, policy: Policy) -> dict[str, Any]:
    """The data set with one distribution per split, in JSON-LD."""
    manifest = dataset.manifest
    missing = [option for option, value in (("--description", manifest.description), ("--url", manifest.url),
                                            ("--collected", manifest.collected)) if not value]
    if missing:
        raise DataError(f"{dataset.folder}: MLDCAT-AP asks for {', '.join(missing)}, which nobody has stated. State it: "
                        f"officina data describe {dataset.folder} {' '.join(f'{option} VALUE' for option in missing)}")
    base = f"urn:officina:dataset:{manifest.fingerprint}"
    access = "PUBLIC" if policy == _open(policy) else "RESTRICTED"
    agents = [{"@id": f"{base}:creator:{i}", "@type": "foaf:Agent", "foaf:name": name}
              for i, name in enumerate(manifest.creators)]
    described: dict[str, Any] = {
        "@context": _CONTEXT, "@id": base, "@type": "dcat:Dataset",
        "dct:title": manifest.name, "dct:description": manifest.description, "dct:identifier": manifest.fingerprint,
        "dcat:version": manifest.version, "it6:collectionDate": _date(manifest.collected),
        "dcat:landingPage": {"@id": manifest.url, "@type": "foaf:Document"},
        "dct:accessRights": {"@id": f"{_EU}access-right/{access}", "@type": "dct:RightsStatement"},
        "dct:language": [_language(code) for code in manifest.languages if code != "und"],
        "dct:creator": agents, "dct:issued": _date(manifest.published) if manifest.published else [],
        "it6:dataProvenance": [f"source: {name}" for name in manifest.sources],
        "it6:curationMethod": [f"{step.name} {step.version}: {step.documents_in} documents in, {step.documents_out} out"
                               for step in manifest.steps],
        "prov:wasGeneratedBy": {"@id": f"{base}:build", "@type": "prov:Activity"},
        "dcat:distribution": [_distribution(dataset, policy, base, split) for split in manifest.splits],
    }
    return {key: value for key, value in described.items() if value not in ([], "")}


def _open(policy: Policy) -> Policy:
    """The policy that asks for nothing but its licence."""
    return Policy(dataset=policy.dataset, odrl=policy.odrl, licence=policy.licence, attribution=policy.attribution,
                  synthetic=policy.synthetic, duties=tuple(duty for duty in policy.duties if duty == "attribute"))


def _distribution(dataset: Dataset, policy: Policy, base: str, split: str) -> dict[str, Any]:
    manifest, totals = dataset.manifest, dataset.manifest.splits[split]
    unit = "tokens" if manifest.kind == "tokens" else "bytes of records"
    here = f"{base}:{split}"
    found: dict[str, Any] = {
        "@id": here, "@type": "dcat:Distribution", "dct:title": f"{manifest.name}, split {split}", "dct:identifier": split,
        "dcat:accessURL": {"@id": manifest.url, "@type": "dcat:Resource"},
        "dcat:byteSize": {"@value": str(totals.bytes), "@type": "xsd:nonNegativeInteger"},
        "it6:numberOfDatapoints": {"@value": str(totals.documents), "@type": "xsd:nonNegativeInteger"},
        "dct:format": {"@id": f"{_EU}file-type/BIN", "@type": "dct:MediaTypeOrExtent"},
        "dct:conformsTo": {"@id": "urn:officina:dls:1", "@type": "dct:Standard"},
        "dpv:hasData": {"@id": f"https://w3id.org/dpv#{_DPV[policy.personal_data]}", "@type": "skos:Concept"},
        "spdx:checksum": {"@id": f"{base}:checksum", "@type": "spdx:Checksum",
                          "spdx:algorithm": {"@id": "spdx:checksumAlgorithm_sha256", "@type": "spdx:ChecksumAlgorithm"},
                          "spdx:checksumValue": {"@value": manifest.shards_sha256, "@type": "xsd:hexBinary"},
                          "dct:description": f"Of {SHARDS}, which lists the sha256 of every shard."},
        "dqv:hasQualityMeasurement": {
            "@id": f"{here}:size", "@type": "dqv:QualityMeasurement", "dqv:value": str(totals.tokens),
            "dct:type": {"@id": "urn:officina:quality:size", "@type": "it6:DataQuality", "dct:identifier": "Size",
                         "dct:title": "Size in tokens, or bytes of records", "dct:description": f"Number of {unit}."}},
        "odrl:hasPolicy": to_odrl(policy, target=here) | {"@id": f"{base}:policy:{split}",
                                                          "@type": ["odrl:Offer", "odrl:Policy"]},
    }
    if policy.licence:
        name = licence_url(policy.licence[0]) if len(policy.licence) == 1 else ""
        address = name if name.startswith("http") else f"{base}:licence"
        found["dct:license"] = {"@id": address, "@type": "dct:LicenseDocument", "dct:title": " and ".join(policy.licence)}
    return found


def _date(text: str) -> dict[str, str]:
    return {"@value": text, "@type": _TYPES.get(len(text), "xsd:string")}


def _language(code: str) -> dict[str, str]:
    """`fin_Latn` -> the EU authority's FIN."""
    return {"@id": f"{_EU}language/{re.split('[_-]', code)[0].upper()}", "@type": "dct:LinguisticSystem"}
