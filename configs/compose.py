"""From the words of a command line to a checked RunConfig. The only module that imports Hydra.

Hydra composes the YAML groups of this folder (and a user's own files) and reads lists and dicts in its grammar; site profiles
are read by `officina.configs.sites`. Typing, closedness and everything a user is told about a mistake come from
`officina.trainer.schema`, all problems at once.
Scalars reach the types as the text that was typed: `site.account=1e5` stays text, `steps=1e3` is 1000.
"""

import copy
import difflib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from officina.configs.personal import SOURCE_PATH, personal_words
from officina.configs.sites import find_site
from officina.trainer.config import RunConfig
from officina.trainer.errors import ConfigError, Problem
from officina.trainer.init_from import FROM_INIT, model_values
from officina.trainer.keys import GROUPS, Values, generic, optional
from officina.trainer.schema import dump_run, read_run, unknown_key

_FOLDER = Path(__file__).parent
_TYPED_BY_HYDRA = "model.args."
"""Arguments of a user's own model have no declared type: here `192` is a number because Hydra says so."""


@dataclass(frozen=True, slots=True)
class Composed:
    """What the words came to."""

    run: RunConfig
    """With problems, defaults stand where values were wrong: good for checking the rest, for nothing else."""
    problems: list[Problem]
    defaults: list[tuple[str, str]]
    """Words taken from a person's or a centre's defaults, each with the file it stands in."""
    site: str = ""
    """The site as it was chosen, a name or a file; empty = none was. `officina.configs.sites.find_site` reads it."""


@dataclass(frozen=True, slots=True)
class _Word:
    """One word of the command line, read."""

    key: str
    value: object = None
    removes: bool = False
    """`~key`: back to the default."""
    chooses: bool = False
    """`group=option`."""


def compose(words: Sequence[str]) -> RunConfig:
    """The run that `group=option`, `key=value`, `+key=value` and `~key` describe. Raises ConfigError with every fault."""
    composed = compose_all(words)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed.run


def compose_all(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> Composed:
    """Like `compose`, but gives the problems back. `environ`: where XDG_CONFIG_HOME and XDG_CONFIG_DIRS are looked up."""
    problems: list[Problem] = []
    typed = _read_words(words, problems)
    personal: list[tuple[_Word, str, str]] = []
    for text, origin in personal_words(environ, problems):
        told: list[Problem] = []
        personal += [(word, text, origin) for word in _read_words([text], told)]
        problems += [replace(p, rule=f"{p.rule} ({origin})") for p in told]
    choices = {w.key: str(w.value) for w in [p[0] for p in personal] + typed if w.chooses}
    values = _compose_groups(choices, problems, environ)
    sources = set(values.get("data", {}).get("sources") or {}) | {
        w.key.split(".")[2] for w in typed if w.key.startswith("data.sources.")}
    personal = [p for p in personal if not (m := SOURCE_PATH.fullmatch(p[0].key)) or m[1] in sources]
    _lay_over(values, [w for w in typed if w.chooses], environ)
    _take_model(values, typed, problems)
    good = copy.deepcopy(values)
    _apply(values, [p[0] for p in personal] + typed, problems)
    run, faults = read_run(values, good=good)
    origin_of = {word.key: origin for word, _, origin in personal} | {w.key: None for w in typed}
    problems = [replace(p, rule=f"{p.rule} ({file})") if (file := origin_of.get(p.key)) and file not in p.rule else p
                for p in problems + faults]
    return Composed(run, problems, [(text, origin) for _, text, origin in personal], choices.get("site", ""))


def recompose(saved: RunConfig, words: Sequence[str]) -> Composed:
    """The saved run with the words applied. A newly chosen option keeps the values that it shares with the old one."""
    problems: list[Problem] = []
    typed = _read_words(words, problems)
    values = dump_run(saved)
    good = copy.deepcopy(values)
    for word in typed:
        if word.chooses and word.key == "experiment":
            problems.append(Problem("experiment", word.value, "is chosen when a run is started and kept from then on",
                                    "name the keys that change instead, such as optim.lr=1e-4"))
        elif word.chooses:
            before = len(problems)
            option = _compose_groups({word.key: str(word.value)}, problems, os.environ).get(word.key, {})
            if word.key == "model":
                option = _take_model({"init_from": saved.init_from, "model": option}, typed, problems)
            if len(problems) == before:
                values[word.key] = _carry_over(word.key, values[word.key], option)
    _apply(values, typed, problems)
    run, faults = read_run(values, good=good)
    return Composed(run, problems + faults, [])


def _lay_over(values: Values, chosen: Sequence[_Word], environ: Mapping[str, str]) -> None:
    """Put the values of options that were typed over those of the experiment, which Hydra lays over all options."""
    if any(word.key == "experiment" for word in chosen):
        for group, option in {w.key: str(w.value) for w in chosen if w.key not in ("experiment", "site")}.items():
            told: list[Problem] = []  # what is wrong with it was found when all was composed
            own = _compose_groups({group: option}, told, environ).get(group)
            if not told and isinstance(own, dict) and isinstance(values.get(group), dict):
                values[group] = _merged(values[group], own)


def _take_model(values: Values, typed: list[_Word], problems: list[Problem]) -> Values:
    """For `model=from_init`, put the model that `init_from` names into the values. Returns the part `model`."""
    model = values.get("model")
    if isinstance(model, dict) and model.get("kind") == FROM_INIT:
        named = [word.value for word in typed if word.key == "init_from"] or [values.get("init_from") or ""]
        values["model"], found = model_values(str(named[-1]), model)
        problems += found
    return values.get("model", {})


def options(group: str) -> list[str]:
    """The shipped options of a group."""
    return sorted(path.stem for path in (_FOLDER / group).glob("*.yaml"))


def _carry_over(group: str, old: Values, option: Values) -> Values:
    kept = {name: value for name, value in old.items()
            if generic(f"{group}.{name}", {group: option}) and name != "kind"}
    if group == "lr_schedule" and option.get("kind") != "wsd":
        kept.pop("decay_steps")  # means nothing to the others, which refuse it
    return kept | option


# ---- words -------------------------------------------------------------------------------------------------
def _read_words(words: Sequence[str], problems: list[Problem]) -> list[_Word]:
    read = []
    for text in words:
        sign, key, raw = re.fullmatch(r"(~|\+{0,2})([^=]*)(?:=(.*))?", text, re.DOTALL).groups()
        key = key.strip()
        if sign == "~" and key:
            read.append(_Word(key, removes=True))
        elif raw is None or not key:
            problems.append(_not_a_word(text))
        elif key in GROUPS and not raw.startswith("{"):
            read.append(_Word(key, raw, chooses=True))
        else:
            try:
                read.append(_Word(key, _read_value(key, raw)))
            except ValueError as error:
                problems.append(Problem(
                    key, raw, str(error),
                    f"'{key}=[1,2]' or '{key}={{name:value}}'" if raw[:1] in "[{" else f"{key}=VALUE written out"))
    return read


def _not_a_word(text: str) -> Problem:
    group = next((g for g in GROUPS if text in options(g)), None)
    if group:
        remedy = f"{group}={text}"
    elif generic(text.strip("=")):
        remedy = f"{text.strip('=')}=VALUE"
    else:
        remedy = "optim.lr=3e-4 or engine=fsdp2, with no space around ="
    return Problem(text, None, "is not of the form key=value", remedy)


def _read_value(key: str, raw: str) -> object:
    """Lists, dicts and quoted text in Hydra's grammar; everything else as the text that was typed."""
    if "${" in raw:
        raise ValueError("holds an interpolation; nothing in a run may depend on the machine it was typed on")
    if raw.lower() in ("null", "none") and optional(key):
        return None
    by_hydra = raw[:1] in ("[", "{") or (raw[:1] in "'\"" and raw[:1] == raw[-1:] and len(raw) > 1)
    if not by_hydra and not key.startswith(_TYPED_BY_HYDRA):
        return raw
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"value={raw}")
    except HydraException:
        if by_hydra:
            raise ValueError("is not a list, a set of keys or a quoted text that can be read") from None
        return raw
    return override.value() if override.value_type is ValueType.ELEMENT else raw


def _apply(values: Values, words: list[_Word], problems: list[Problem]) -> None:
    """Set and remove keys in the order of the words; `kind` first, since it decides which keys there are."""
    for word in sorted((w for w in words if not w.chooses), key=lambda w: not w.key.endswith(".kind")):
        if generic(word.key, values) is None:
            problems.append(unknown_key(word.key, None if word.removes else word.value, values))
            continue
        *stem, leaf = word.key.split(".")
        here = values
        for part in stem:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            here = here[part]
        if word.removes:
            here.pop(leaf, None)
        elif isinstance(word.value, dict) and isinstance(here.get(leaf), dict):
            here[leaf] = _merged(here[leaf], word.value)
        else:
            here[leaf] = word.value


def _merged(old: dict, new: dict) -> dict:
    both = {name for name in new if isinstance(new[name], dict) and isinstance(old.get(name), dict)}
    return old | {name: _merged(old[name], new[name]) if name in both else new[name] for name in new}


# ---- groups -----------------------------------------------------------------------------------------------
def _compose_groups(choices: Mapping[str, str], problems: list[Problem], environ: Mapping[str, str]) -> Values:
    """The values of config.yaml with the chosen options; options that do not exist become problems and are left out.

    A site's file is a profile, which is for submitting and not for the run: of it the run keeps the name.
    """
    site = choices.get("site")
    values = _by_options({group: option for group, option in choices.items() if group != "site"}, problems)
    if site is not None:
        try:
            values["site"] = {**values.get("site", {}), "name": find_site(site, environ).id}
        except ConfigError as error:
            problems += [p if p.key == "site" else replace(p, rule=f"{p.rule} (in the profile of site={site})")
                         for p in error.problems]
    return values


def _by_options(choices: Mapping[str, str], problems: list[Problem]) -> Values:
    good = {}
    for group, option in choices.items():
        if option.endswith((".yaml", ".yml")):
            if fault := _own_fault(option):
                problems.append(Problem(group, option, fault[0], f"{group}={fault[1]}" if fault[1][:1] in "./~" else fault[1]))
                continue
        elif (group, option) == ("experiment", "null"):
            continue  # none, as config.yaml has it
        elif option not in options(group):
            problems.append(_no_such_option(group, option))
            continue
        good[group] = option
    own = {group: option for group, option in good.items() if option.endswith((".yaml", ".yml"))}
    if not own:
        return copy.deepcopy(_shipped(tuple(sorted(good.items()))))
    with tempfile.TemporaryDirectory(prefix="officina-") as folder:
        try:
            lent = {group: _lend(Path(path).expanduser(), group, Path(folder)) for group, path in own.items()}
            values = _by_hydra({**good, **lent}, [f"hydra.searchpath=[file://{folder}]"])
        except (*_hydra_errors(), OSError, ValueError) as error:
            for group, path in own.items():
                problems.append(Problem(group, path, f"cannot be composed: {_without_jargon(error)}", f"mend {path}"))
            return copy.deepcopy(_shipped(tuple(sorted((g, o) for g, o in good.items() if g not in own))))
    _drop_marks(values, "", problems)
    return values


@cache
def _shipped(choices: tuple[tuple[str, str], ...]) -> Values:
    return _by_hydra(dict(choices), [])


def _by_hydra(choices: Mapping[str, str], overrides: list[str]) -> Values:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(_FOLDER), version_base="1.3", job_name="officina"):
        composed = hydra_compose("config", [*overrides, *(f"{g}={o}" for g, o in choices.items())])
    return OmegaConf.to_container(composed, resolve=False)


def _hydra_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException


def _own_fault(option: str) -> tuple[str, str] | None:
    """What is wrong with a user's file by itself, and the remedy: told by the file's own lines, before Hydra sees a copy."""
    from omegaconf._utils import get_yaml_loader  # refuses a key that stands twice

    path, mend = Path(option).expanduser(), f"mend {option}"
    if not os.path.isfile(path):
        beside = {p.stem: p for p in path.parent.glob("*.y*ml") if p.is_file()} if os.path.isdir(path.parent) else {}
        near = difflib.get_close_matches(path.stem, beside, 1)
        found = os.path.join(os.path.dirname(option) or ".", beside[near[0]].name) if near else f"ls {path.parent}"
        return "is a folder" if os.path.isdir(path) else "there is no such file", found
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader())
        if values is not None and not isinstance(values, dict):
            return "must hold keys and values, such as steps: 1000", mend
        if "hydra" in (values or {}):
            return "sets `hydra`, which is of Hydra's own programs and would change nothing here", f"{mend}: remove `hydra`"
        _check_nesting(values, ())
    except UnicodeDecodeError:
        return "is not UTF-8 text", "a file of YAML text, such as steps: 1000"
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        begun = "<stream end>" in what and getattr(error, "context_mark", None)  # what is never closed: where it begins
        mark = begun or getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else ""
        return f"cannot be composed: {line}{': ' * bool(mark)}{what}", f"mend {line}{' of ' * bool(mark)}{option}"
    except RecursionError:
        return "cannot be composed: it holds itself, by an alias or a nesting without end", mend
    except (OSError, ValueError) as error:
        return f"cannot be composed: {getattr(error, 'strerror', None) or error}", mend
    return None


def _check_nesting(values: object, above: tuple[int, ...]) -> None:
    """RecursionError for an alias within its own anchor, ValueError for a key that is no name."""
    if id(values) in above:
        raise RecursionError
    if isinstance(values, dict):
        for name in values:
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"the key {name!r} is no name; keys are nested, optim: {{lr: 1e-3}}")
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        _check_nesting(value, (*above, id(values)))


def _without_jargon(error: Exception) -> str:
    """What Hydra says of a user's file, without its names for the copy and its folders."""
    if missing := getattr(error, "missing_cfg_file", None):
        group, _, name = str(missing).rpartition("/")
        there = f"; there are {', '.join(options(group))}" if options(group) else ""
        return f"its defaults name {group or 'no group'}/{name}, which is no option{there}"
    return " ".join(re.sub(r"(In )?'[^']*_of_the_user'[:,]?|full_key:.*|object_type=.*", "", str(error)).split())


def _lend(path: Path, group: str, folder: Path) -> str:
    """Put a user's file where Hydra finds it as an option of `group`; returns the option's name."""
    text = path.read_text(encoding="utf-8")
    if group == "experiment" and not re.match(r"\s*#\s*@package", text):
        text = f"# @package _global_\n{text}"  # without it, Hydra would put the values below `experiment`
    name = re.sub(r"[^A-Za-z0-9_]", "_", path.stem) + "_of_the_user"
    (folder / group).mkdir(exist_ok=True)
    (folder / group / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def _no_such_option(group: str, option: str) -> Problem:
    there = options(group)
    near = difflib.get_close_matches(option, there, 1, 0.3) or there
    elsewhere = [g for g in GROUPS if g != group and option in options(g)]
    slip = difflib.get_close_matches(option, there, 1, 0.6)
    remedy = f"{elsewhere[0]}={option}" if elsewhere and not slip else f"{group}={near[0]}"
    return Problem(group, option, f"there is no such option; there are {', '.join(there)}, and your own file, ./my.yaml",
                   remedy)


def _drop_marks(values: Values, prefix: str, problems: list[Problem]) -> None:
    """Refuse interpolations and leave out `???` (a required value that a file leaves open)."""
    for name, value in list(values.items()):
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _drop_marks(value, f"{key}.", problems)
        elif isinstance(value, str) and "${" in value:
            problems.append(Problem(key, value, "holds an interpolation; nothing in a run may depend on the machine",
                                    f"{key}=VALUE written out"))
            values.pop(name)
        elif value == "???":
            values.pop(name)
