"""Site profiles: found by name, alias or host, laid over each other, every value with where it comes from.

A profile is a YAML file of `configs/site/`. A centre's `officina/sites/ID.yaml` (in a folder of XDG_CONFIG_DIRS) lies over the
packaged one, a person's (in XDG_CONFIG_HOME, by default ~/.config) over both; a file that names `extends: ID` lies over
that site. Torch-free and read on the submitting side only: a rank reads RUN/config.yaml and needs no profile.

A value is written bare below a `source`, or as {value: 4, source: NAME, grade: ..., date: ..., note: ...}; sources are named at
the top of the file. In a file of a person or a centre the source may be left out. `null` takes away what a lower file says.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from officina.configs.site_profile import SiteProfile
from officina.trainer.errors import ConfigError, Problem
from officina.trainer.keys import fields_of, item_type, variants_of

FOLDER = Path(__file__).parent / "site"
ANNOUNCED = Path(__file__).parent / "announced_sites.yaml"
GRADES = {"official": "the site's own document, repository or scheduler",
          "copy": "an official page, read through a public copy",
          "third_party": "users' configurations, notes and measurements",
          "unverified": "not confirmed by anyone: check it before you rely on it",
          "own": "chosen by officina, or set in a file of yours or your centre's"}
IDENTITY = ("name", "operator", "factory", "aliases", "docs", "scheduler")
"""Values that name the system and need no source."""
_META = ("extends", "sources")
_MARKS = ("source", "grade", "date", "note")


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from."""

    name: str
    grade: str
    date: str
    """Of the page where it has one, else when it was read."""
    title: str
    url: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """One value of a profile, as it was written."""

    value: object
    grade: str
    source: Source
    file: Path
    date: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """A system: its profile, and for each dotted key in it a Fact."""

    id: str
    profile: SiteProfile
    facts: dict[str, Fact]
    notes: dict[str, str]
    """Remarks on whole sections, by dotted key."""
    files: tuple[Path, ...]
    """Those that were laid over each other, lowest first."""

    def unverified(self) -> list[str]:
        """Keys whose values nobody confirmed."""
        return [key for key, fact in self.facts.items() if fact.grade == "unverified"]


@dataclass(frozen=True, slots=True)
class Announced:
    """A system that is not in service."""

    id: str
    operator: str
    factory: str
    gpus: str
    nodes: str
    expected: str
    grade: str
    date: str
    source: str
    note: str


Path_ = tuple[str, ...]


@dataclass(slots=True)
class _Layer:
    """One file, flat."""

    file: Path
    extends: str
    facts: dict[Path_, Fact | None]
    """None = taken away."""
    notes: dict[Path_, str]


# ---- finding ---------------------------------------------------------------------------------------------------------
def config_folders(environ: Mapping[str, str]) -> list[Path]:
    """`officina/` of the centre (XDG_CONFIG_DIRS), then of the person (XDG_CONFIG_HOME): later ones lie over earlier ones."""
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".config")
    centre = [folder for folder in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]
    return [Path(folder) / "officina" for folder in [*reversed(centre), home]]


def site_ids(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Every site that can be chosen: those with GPUs and a scheduler first."""
    own = [site for site in _catalog(environ) if site not in ("slurm", "local")]
    return [*sorted(own), "slurm", "local"]


def find_site(word: str, environ: Mapping[str, str] = os.environ) -> Site:
    """The site that `word` means: an id, an alias, or a YAML file. Raises ConfigError."""
    if word.endswith((".yaml", ".yml")):
        path = Path(word).expanduser()
        if not path.is_file():
            raise ConfigError([Problem("site", word, "there is no such file", "site=lumi")])
        layer = _read(path)
        base = _site_id(layer.extends, environ, path) if layer.extends else path.stem
        return _build(base, [*(_layers(base, environ) if layer.extends else []), layer])
    site = _site_id(word, environ)
    return _build(site, _layers(site, environ))


def site_of(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Id of the site that has this id or alias, None if none has."""
    return _by_alias(name, _catalog(environ))


def detect_site(hostname: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Id of the site to which this host belongs by its name; None if no pattern fits."""
    names = {hostname, hostname.split(".")[0]}
    for site, files in _catalog(environ).items():
        patterns = [str(p) for file in files for p in _listed(_parsed(file).get("hosts"))]
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in names):
            return site
    return None


def announced() -> list[Announced]:
    """Systems that are announced: for planning, not for jobs."""
    return [Announced(**{name: str(value) for name, value in row.items()}) for row in _load(ANNOUNCED)]


def _listed(value: object) -> list:
    """The items of a profile's value; text alone is one of them, so that the fault is told when its profile is read."""
    plain = value.get("value") if isinstance(value, Mapping) else value
    return plain if isinstance(plain, list) else [] if plain is None else [plain]


def _catalog(environ: Mapping[str, str]) -> dict[str, list[Path]]:
    """Site id -> its files, lowest first. A file named by an alias belongs to that site."""
    files = {path.stem: [path] for path in sorted(FOLDER.glob("*.yaml"))}
    for folder in config_folders(environ):
        for path in sorted((folder / "sites").glob("*.yaml")):
            site = _by_alias(path.stem, files) or path.stem
            files.setdefault(site, []).append(path)
    return files


def _by_alias(word: str, catalog: Mapping[str, list[Path]]) -> str | None:
    if word in catalog:
        return word
    return next((site for site, files in catalog.items()
                 for file in files if word in _listed(_parsed(file).get("aliases"))), None)


def _site_id(word: str, environ: Mapping[str, str], named_in: Path | None = None) -> str:
    catalog = _catalog(environ)
    if site := _by_alias(word, catalog):
        return site
    aliases = {alias: site for site, files in catalog.items() for file in files
               for alias in _listed(_parsed(file).get("aliases"))}
    if planned := next((a for a in announced() if a.id == word), None):
        raise ConfigError([Problem("site", word, f"is announced, not in service (expected: {planned.expected})", "site=lumi")])
    near = (difflib.get_close_matches(word, [*catalog, *aliases], 1, 0.5) or ["slurm"])[0]
    rule = f"there is no such site; there are {', '.join(site_ids(environ))}"
    if named_in:
        raise ConfigError([Problem("extends", word, rule, f"extends: {near}")], str(named_in))
    raise ConfigError([Problem("site", word, f"{rule}, and your own file, ./my.yaml", f"site={near}")])


def _layers(site: str, environ: Mapping[str, str], above: tuple[str, ...] = ()) -> list[_Layer]:
    found = []
    for file in _catalog(environ)[site]:
        layer = _read(file)
        if layer.extends and (base := _site_id(layer.extends, environ, file)) != site:
            if base in above:
                circle = " -> ".join([*above, site, base])
                raise ConfigError([Problem("extends", layer.extends, f"goes round in a circle, {circle}", "extends: slurm")],
                                  str(file))
            found += _layers(base, environ, (*above, site))
        found.append(layer)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------
@cache
def _load_text(text: str) -> object:
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _load(file: Path) -> object:
    try:
        return _load_text(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(file), None, f"cannot be read: {' '.join(str(error).split())}",
                                   f"mend or remove {file}")], str(file)) from None


def _parsed(file: Path) -> Mapping:
    values = _load(file)
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError([Problem(str(file), values, "must hold keys and values", "extends: lumi-g")], str(file))
    return values or {}


def _read(file: Path) -> _Layer:
    values, problems = _parsed(file), []
    sources = dict(_sources(values.get("sources") or {}, problems))
    by_hand = Source("", "own", "", f"set in {file.name}")
    layer = _Layer(file, str(values.get("extends") or ""), {}, {})
    top = {name: value for name, value in values.items() if name not in _META}
    _flatten(top, (), by_hand, {}, sources, layer, problems)
    if FOLDER in file.parents:
        problems += [Problem(".".join(path), fact.value, "has no source", f"name one of {', '.join(sources)}")
                     for path, fact in layer.facts.items() if fact and not fact.source.name and path[0] not in IDENTITY]
    if problems:
        raise ConfigError(problems, str(file))
    return layer


def _sources(values: object, problems: list[Problem]) -> Iterator[tuple[str, Source]]:
    for name, value in values.items() if isinstance(values, Mapping) else []:
        given = {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
        wrong = set(given) - {"grade", "date", "title", "url"}
        if wrong or not {"grade", "date", "title"} <= set(given) or given["grade"] not in GRADES:
            problems.append(Problem(f"sources.{name}", given,
                                    f"needs grade ({', '.join(GRADES)}), date and title, and may have url",
                                    f"sources: {{{name}: {{grade: official, date: 2026-11-24, title: what it is}}}}"))
            given = {"grade": "unverified", "date": "", "title": ""}  # so that what names it is judged for itself
        yield str(name), Source(str(name), **given)


def _flatten(value: object, path: Path_, source: Source, marks: Mapping, sources: Mapping[str, Source], layer: _Layer,
             problems: list[Problem]) -> None:
    """Put the leaves below `value` into the layer. `marks`: grade and date that stand above."""
    if isinstance(value, Mapping):
        own = {name: str(value[name]) for name in _MARKS if name in value}
        if (name := own.get("source")) is not None:
            if name not in sources:
                near = difflib.get_close_matches(name, list(sources), 1, 0.0) or ["guide"]
                problems.append(Problem(".".join((*path, "source")), name, f"is not among the sources of the file: "
                                        f"{', '.join(sources) or 'there are none'}", f"source: {near[0]}"))
                return
            source, marks = sources[name], {}
        if own.get("grade", "own") not in GRADES:
            problems.append(Problem(".".join((*path, "grade")), own["grade"], f"must be one of {', '.join(GRADES)}",
                                    "grade: unverified"))
            return
        marks = {**marks, **{name: own[name] for name in ("grade", "date") if name in own}}
        if "value" not in value:
            if "note" in own:
                layer.notes[path] = own["note"]
            for name, inner in value.items():
                if name not in _MARKS:
                    _flatten(inner, (*path, str(name)), source, marks, sources, layer, problems)
            return
        if unknown := set(value) - {"value", *_MARKS}:
            problems.append(Problem(".".join((*path, min(unknown))), value[min(unknown)], "there is no such key beside value",
                                    f"use {', '.join(_MARKS)}"))
        note = own.get("note", "")
        value = value["value"]
    else:
        note = ""
    if value is None and (known := _siblings(path[:-1])) and path[-1] not in known:
        problems.append(_unknown(path, None, layer.file))  # a comma in text without quotes makes such keys
    layer.facts[path] = None if value is None else Fact(
        value, marks.get("grade", source.grade), source, layer.file, marks.get("date", source.date), note)


def _build(site: str, layers: list[_Layer]) -> Site:
    facts: dict[Path_, Fact] = {}
    notes: dict[Path_, str] = {}
    for layer in layers:
        for path, fact in layer.facts.items():
            for old in [p for p in facts if p[:len(path)] == path or path[:len(p)] == p]:
                if old != path or fact is None:
                    del facts[old]
            if fact is not None:
                facts[path] = fact
        notes |= layer.notes
    values: dict = {}
    for path, fact in facts.items():
        here = values
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = fact.value
    try:
        profile = _adapter().validate_python(values)
    except ValidationError as error:
        found = [_problem(item, facts) for item in error.errors(include_url=False)]
        raise ConfigError(found, " and ".join(str(layer.file) for layer in layers[-1:]) if layers else site) from None
    return Site(site, profile, {".".join(p): f for p, f in facts.items()}, {".".join(p): n for p, n in notes.items()},
                tuple(dict.fromkeys(layer.file for layer in layers)))


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(SiteProfile)


def _problem(item: Mapping, facts: Mapping[Path_, Fact]) -> Problem:
    loc = tuple(str(part) for part in item["loc"])
    path = next((p for p in sorted(facts, key=len, reverse=True) if p == loc[:len(p)]), loc)
    fact, key = facts.get(path), ".".join(loc if len(loc) < len(path) else path)
    where = f" ({fact.file})" if fact else ""
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(loc, fact.value if fact else None, fact.file if fact else None)
    message = item["msg"].removeprefix("Value error, ")
    works = f'"{fact.value}"' if fact and item["type"] == "string_type" else _EXAMPLE.get(item["type"], "VALUE")
    if "a time is written" in message:
        works = "12h"
    if "regular expression" in message:
        works = '"project_.+"'
    if item["type"] in ("missing", "missing_argument"):
        return Problem(key, None, "is required", f"{key}: My cluster")
    return Problem(key, fact.value if fact else None, f"{message[:1].lower()}{message[1:]}{where}", f"{key}: {works}")


def _unknown(path: Path_, value: object, file: Path | None) -> Problem:
    known = _siblings(path[:-1])
    near = difflib.get_close_matches(path[-1], known, 1, 0.4)
    return Problem(".".join(path), value, "there is no such key" + (f" ({file})" if file else ""),
                   ".".join((*path[:-1], near[0])) if near else f"leave it out; there are {', '.join(known)}")


_EXAMPLE = {"literal_error": "one of them", "list_type": "[a, b]", "bool_parsing": "true", "bool_type": "true",
            "value_error": "4", "greater_than_equal": "1", "float_parsing": "64", "float_type": "64",
            "dict_type": "{name: value}", "dataclass_type": "{key: value}"}


def _siblings(path: Path_) -> list[str]:
    """Names that may stand where `path` leads."""
    annotation: object = SiteProfile
    for part in path:
        classes = variants_of(annotation)
        annotation = fields_of(classes[0]).get(part) if classes else item_type(annotation)
    classes = variants_of(annotation)
    return sorted(fields_of(classes[0])) if classes else []
