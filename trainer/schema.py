"""From plain values (YAML, words on the command line) to a RunConfig, with every fault named and mended.

Knows the tree of keys that `officina.trainer.config` declares; knows no rule between keys (`officina.trainer.validate`).
"""

import dataclasses
import difflib
import json
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache

from pydantic import TypeAdapter, ValidationError

from officina.trainer import config
from officina.trainer.errors import Problem

Values = dict[str, object]
"""A run as nested plain values, as YAML holds it."""

GROUPS = ("model", "engine", "data", "optim", "lr_schedule", "objective", "checkpoint", "logging", "site", "experiment")
"""Parts of a run that can be chosen by name, `engine=zero2`. `experiment` is a whole run."""

EXAMPLES = {
    "data.sources.*.path": "demo/data",
    "model.factory": "my_package.model:build",
    "model.loss": "my_package.model:loss",
    "model.decoder": "my_package.model:decode",
}
"""Values of the keys that have no default, for error messages."""

_FREE = "*"
"""Stands for a name the user chose, in `data.sources.*.path`."""


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(config.RunConfig)


@cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def _plain(annotation: object) -> object:
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _variants(annotation: object) -> list[type]:
    """The dataclasses a value of this type may be: one, several (a union by `kind`), or none for a leaf."""
    annotation = _plain(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [cls for option in typing.get_args(annotation) for cls in _variants(option)]
    return []


def _dict_value(annotation: object) -> object | None:
    """The value type of a `dict[str, X]` field; None for other types."""
    annotation = _plain(annotation)
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def _kind(cls: type) -> str:
    return cls.__dataclass_fields__["kind"].default


def _chosen(variants: list[type], default: object, here: object) -> type:
    """The variant that `here["kind"]` names, else the default's."""
    if len(variants) == 1:
        return variants[0]
    kind = here.get("kind") if isinstance(here, Mapping) else None
    return next((cls for cls in variants if _kind(cls) == kind), type(default) if default is not None else variants[0])


def _default(cls: type, name: str) -> object:
    field = cls.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def leaves(values: Mapping | None = None) -> dict[str, object]:
    """Every dotted key of a run -> its default (`dataclasses.MISSING` if it has none), for the kinds chosen in `values`.

    Names that users choose stand as `*`. Without `values`, the keys of all kinds.
    """
    return dict(_leaves(config.RunConfig, "", values, everything=values is None))


def _leaves(cls: type, prefix: str, values: object, everything: bool) -> Iterator[tuple[str, object]]:
    for name, annotation in _hints(cls).items():
        key, default = f"{prefix}{name}", _default(cls, name)
        here = values.get(name) if isinstance(values, Mapping) else None
        if variants := _variants(annotation):
            if default is None and here is None and not everything:  # an optional part that is left out
                yield key, None
            for variant in variants if everything else [_chosen(variants, default, here)]:
                yield from _leaves(variant, f"{key}.", here, everything)
        elif (item := _dict_value(annotation)) is not None:
            if inner := _variants(item):
                yield from _leaves(inner[0], f"{key}.{_FREE}.", None, everything)
            else:
                yield f"{key}.{_FREE}", dataclasses.MISSING
        else:
            yield key, default


def generic(key: str, values: Mapping | None = None) -> str | None:
    """The declared form of a dotted key (`data.sources.wiki.path` -> `data.sources.*.path`); None if there is no such key."""
    classes: list[type] = [config.RunConfig]
    parts, done, here = key.split("."), [], values
    item: object | None = None  # value type of the dict we are in
    for i, part in enumerate(parts):
        if item is not None:
            if not part:
                return None
            done.append(_FREE)
            classes, item = _variants(item), None
        else:
            owner = next((cls for cls in classes if part in _hints(cls)), None)
            if owner is None:
                return None
            done.append(part)
            annotation, default = _hints(owner)[part], _default(owner, part)
            here = here.get(part) if isinstance(here, Mapping) else None
            item = _dict_value(annotation)
            classes = _variants(annotation)
            if len(classes) > 1 and values is not None:
                classes = [_chosen(classes, default, here)]
        if not classes and item is None and i + 1 < len(parts):
            return None
    return ".".join(done)


def optional(key: str) -> bool:
    """May this key hold nothing (`null`)? Of keys that exist for several kinds, one that may is enough."""
    return _is_optional(config.RunConfig, key.split("."))


def _is_optional(cls: type, parts: list[str]) -> bool:
    annotation = _hints(cls).get(parts[0])
    if annotation is None:
        return False
    if len(parts) == 1:
        return type(None) in typing.get_args(_plain(annotation))
    return any(_is_optional(inner, parts[1:]) for inner in _variants(annotation))


def lookup(values: object, key: str) -> object:
    """The value at a dotted key of nested mappings, None if there is none."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def as_text(value: object) -> str:
    """A value as it is written after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{as_text(item)}" for name, item in value.items()) + "}"
    return str(value)


def word(key: str, value: object) -> str:
    """`key=value` as it is typed into a shell."""
    return shlex.quote(f"{key}={as_text(value)}") if isinstance(value, str) else f"{key}={as_text(value)}"


# ---- unknown keys --------------------------------------------------------------------------------------------------
def unknown_key(key: str, value: object, values: Mapping) -> Problem:
    """The Problem of a key that does not exist, with the key that was probably meant."""
    declared = generic(key)
    if declared is not None:
        return _other_kind(key, value, declared, values)
    known = leaves(values)
    stem, _, leaf = key.rpartition(".")
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    if "." not in key and (groups := difflib.get_close_matches(key, GROUPS, 1, 0.55)) and isinstance(value, str) \
            and not same_leaf:
        return Problem(key, value, "there is no such key", word(groups[0], value))
    siblings = [k for k in known if k.rpartition(".")[0] == (generic(stem, values) or stem if stem else "")]
    near = (difflib.get_close_matches(key, same_leaf, 1, 0.0)
            or _closest(leaf, {k.rpartition(".")[2]: k for k in siblings})
            or difflib.get_close_matches(key, list(known), 1, 0.6)
            or _closest(leaf, {k.rpartition(".")[2]: k for k in known}))
    if near:
        meant = _with_names(near[0], key)
        others = [k for k in same_leaf if k != near[0]]
        also = f"; {', '.join(others)} exist too" if others else ""
        return Problem(key, value, f"there is no such key{also}", word(meant, value))
    elsewhere = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in leaves()], 1, 0.75)
    if elsewhere:  # a key of a kind that is not chosen
        meant = next(k for k in leaves() if k.rpartition(".")[2] == elsewhere[0])
        found = _other_kind(_with_names(meant, key), value, meant, values)
        return Problem(key, value, f"there is no such key; {meant} belongs to another kind", found.remedy)
    there = sorted({k.removeprefix(f"{stem}.").split(".")[0] for k in known if not stem or k.startswith(f"{stem}.")})
    where = f"the keys of {stem} are" if stem and there else "the top keys are"
    there = there or sorted({k.split(".")[0] for k in known})
    return Problem(key, value, "there is no such key", f"leave it out; {where} {', '.join(there)}")


def _closest(leaf: str, key_of: dict[str, str]) -> list[str]:
    return [key_of[near] for near in difflib.get_close_matches(leaf, list(key_of), 1, 0.6)]


def _with_names(declared: str, typed: str) -> str:
    """`data.sources.*.path` with the name the user typed at that place, else NAME."""
    names, parts = typed.split("."), declared.split(".")
    aligned = len(names) == len(parts)
    return ".".join((names[i] if aligned else "NAME") if part == _FREE else part for i, part in enumerate(parts))


def _other_kind(key: str, value: object, declared: str, values: Mapping) -> Problem:
    """The key exists, but not for the kind that is chosen: `engine.stage` under engine=fsdp2."""
    part = declared.split(".")[0]
    name = declared.split(".")[1]
    annotation = _hints(config.RunConfig)[part]
    chosen = _chosen(_variants(annotation), _default(config.RunConfig, part), values.get(part))
    kinds = [_kind(cls) for cls in _variants(annotation) if name in _hints(cls)]
    if name == "stage" and str(value) in "123":
        remedy = f"{part}=zero{value}"
    else:
        remedy = f"{part}={'zero3' if kinds[0] == 'zero' else kinds[0]} {word(key, value)}"
    return Problem(key, value, f"{part}={_kind(chosen)} has no {name}; {', '.join(kinds)} has it", remedy)


# ---- reading -------------------------------------------------------------------------------------------------------
def read_run(values: Values, *, good: Mapping | None = None) -> tuple[config.RunConfig, list[Problem]]:
    """The run that `values` describe, and every fault of type, range or spelling in them.

    With faults, the run has defaults in their place, so that the rules between the other keys can still be checked;
    it must not be used for anything else. `good`: values to prefer over defaults in remedies.
    """
    values = _with_kinds(values)
    found: dict[str, Problem] = {}
    for _ in range(1000):  # each round mends at least one key
        try:
            return _adapter().validate_python(values), list(found.values())
        except ValidationError as error:
            for item in error.errors(include_url=False):
                key, value = _key_of(item["loc"], values)
                problem = _problem(item, key, value, values, good or {})
                found.setdefault(key, problem)
                _mend(values, key, item["type"])
    raise AssertionError(f"these values cannot be mended: {values}")


def dump_run(run: config.RunConfig) -> Values:
    """The run as nested plain values: every key, also those that stand at their default."""
    return _adapter().dump_python(run, mode="json")


def _with_kinds(values: Values) -> Values:
    """A deep copy in which every part that has kinds names one."""
    values = json.loads(json.dumps(values)) if _is_json(values) else _copy(values)
    for name, annotation in _hints(config.RunConfig).items():
        variants = _variants(annotation)
        if len(variants) > 1 and isinstance(part := values.get(name, {}), dict):
            values[name] = {"kind": _kind(type(_default(config.RunConfig, name)))} | part
    return values


def _is_json(values: object) -> bool:
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return False
    return True


def _copy(value: object) -> typing.Any:
    if isinstance(value, Mapping):
        return {str(k): _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _key_of(loc: tuple[int | str, ...], values: Mapping) -> tuple[str, object]:
    """The dotted key that pydantic's location means (it also names union tags and list places), and the value there."""
    parts, annotation, here = [], config.RunConfig, values
    rest = list(loc)
    while rest:
        part = rest.pop(0)
        if isinstance(part, int) or not isinstance(here, Mapping):
            break
        parts.append(str(part))
        here = here.get(part)
        classes = _variants(annotation)
        item = _dict_value(annotation)
        if classes:
            annotation = next((_hints(cls)[part] for cls in classes if part in _hints(cls)), None)
        else:
            annotation = item
        if annotation is None:
            break
        if len(_variants(annotation)) > 1 and rest and any(rest[0] == _kind(cls) for cls in _variants(annotation)):
            tag = rest.pop(0)  # the union tag; go on within that variant
            annotation = next(cls for cls in _variants(annotation) if _kind(cls) == tag)
    return ".".join(parts), here


def _mend(values: Values, key: str, error_type: str) -> None:
    """Put a default in the place of what is wrong, so that the rest can be read."""
    *stem, leaf = key.split(".")
    here = values
    for part in stem:
        here = here[part]
    declared = generic(key, values)
    if declared in EXAMPLES:
        here[leaf] = EXAMPLES[declared]
    elif error_type.startswith("union_tag") and isinstance(here.get(leaf), dict):
        here.pop(leaf)
        values.update(_with_kinds(values))
    else:
        here.pop(leaf, None)
        if not stem:
            values.update(_with_kinds(values))


def _problem(item: Mapping, key: str, value: object, values: Mapping, good: Mapping) -> Problem:
    kind, ctx = item["type"], item.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, value, values)
    declared = generic(key, values) or key
    if kind.startswith("union_tag"):
        return _bad_kind(key, value)
    if kind in ("missing", "missing_argument"):
        return Problem(key, None, "is required", word(key, EXAMPLES.get(declared, "VALUE")))
    if kind in ("dataclass_type", "dataclass_exact_type", "model_attributes_type"):
        first = next(k for k in leaves() if k.startswith(f"{declared}.") and not k.endswith(".kind"))
        default = leaves()[first]
        example = EXAMPLES.get(first, "VALUE") if default is dataclasses.MISSING else default
        return Problem(key, value, "is a group of keys, not a value",
                       word(first.replace(f"{declared}.", f"{key}.", 1).replace(_FREE, "NAME"), example))
    fallback = lookup(good, key)
    if fallback is None or fallback == value:
        fallback = leaves(values).get(declared, dataclasses.MISSING)
    if fallback is dataclasses.MISSING:
        fallback = EXAMPLES.get(declared, 1)
    if kind == "literal_error":
        options = _literals(declared, values)
        near = difflib.get_close_matches(str(value), options, 1, 0.4)
        return Problem(key, value, f"must be one of {', '.join(options)}", word(key, near[0] if near else fallback))
    if kind == "string_type":
        return Problem(key, value, "must be text; within YAML or {...} write numbers in quotes",
                       word(key, as_text(value) if isinstance(value, int | float) else fallback))
    return Problem(key, value, _rule(kind, ctx, item["msg"]), word(key, fallback))


def _rule(kind: str, ctx: Mapping, message: str) -> str:
    bounds = {"greater_than_equal": "must be at least {ge}", "greater_than": "must be greater than {gt}",
              "less_than_equal": "must be at most {le}", "less_than": "must be less than {lt}"}
    if kind in bounds:
        return bounds[kind].format(**ctx)
    if kind == "value_error":
        return str(ctx["error"])
    named = {"float_parsing": "must be a number such as 3e-4", "float_type": "must be a number such as 3e-4",
             "bool_parsing": "must be true or false", "bool_type": "must be true or false",
             "list_type": "must be a list such as [1,2]", "dict_type": "must be a set of keys, {name:value}",
             "finite_number": "must be a finite number"}
    return named.get(kind, message[:1].lower() + message[1:])


def _bad_kind(key: str, value: object) -> Problem:
    cls = config.RunConfig
    variants = _variants(_hints(cls)[key])
    default = _default(cls, key)
    kinds = [_kind(variant) for variant in variants]
    got = value.get("kind") if isinstance(value, Mapping) else value
    near = difflib.get_close_matches(str(got), kinds, 1, 0.5)
    return Problem(f"{key}.kind", got, f"must be one of {', '.join(kinds)}", f"{key}.kind={near[0] if near else default.kind}")


def _literals(declared: str, values: Mapping) -> list[str]:
    """The options of a Literal field."""
    annotation: object = config.RunConfig
    here: object = values
    for part in declared.split("."):
        classes = _variants(annotation)
        here_kind = here
        if len(classes) > 1:
            classes = [_chosen(classes, None, here_kind)]
        annotation = _hints(classes[0])[part] if classes else _dict_value(annotation)
        here = here.get(part) if isinstance(here, Mapping) else None
    return [str(option) for option in typing.get_args(_plain(annotation))]
