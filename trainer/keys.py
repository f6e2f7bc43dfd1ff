"""The tree of dotted keys that `officina.trainer.config` declares: which there are, their defaults, how they are written."""

import dataclasses
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache

from officina.trainer import config

Values = dict[str, object]
"""A run as nested plain values, as YAML holds it."""

GROUPS = ("model", "adapter", "engine", "data", "use", "optim", "lr_schedule", "objective", "checkpoint", "logging", "site",
          "experiment")
"""Parts of a run that can be chosen by name, `engine=zero2`. `experiment` is a whole run."""

EXAMPLES = {
    "data.sources.*.path": "demo/data",
    "model.factory": "my_package.model:build",
    "model.loss": "my_package.model:loss",
    "model.decoder": "my_package.model:decode",
}
"""Values of the keys that have no default, for error messages."""

FREE = "*"
"""Stands for a name the user chose, in `data.sources.*.path`."""


def flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """`{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`; an empty mapping stands for itself."""
    found: dict[str, object] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


@cache
def fields_of(cls: type) -> dict[str, object]:
    """Field name -> annotation of a configuration dataclass."""
    return typing.get_type_hints(cls, include_extras=True)


def plain(annotation: object) -> object:
    """The annotation without `Annotated`."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def variants_of(annotation: object) -> list[type]:
    """The dataclasses a value of this type may be: one, several (a union by `kind`), or none for a leaf."""
    annotation = plain(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [cls for option in typing.get_args(annotation) for cls in variants_of(option)]
    return []


def item_type(annotation: object) -> object | None:
    """The value type of a `dict[str, X]` field; None for other types."""
    annotation = plain(annotation)
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def kind_of(cls: type) -> str:
    """What `kind` says in values of this class."""
    return cls.__dataclass_fields__["kind"].default


def variant_for(variants: list[type], default: object, here: object) -> type:
    """The variant that `here["kind"]` names, else the default's."""
    if len(variants) == 1:
        return variants[0]
    kind = here.get("kind") if isinstance(here, Mapping) else None
    return next((cls for cls in variants if kind_of(cls) == kind),
                type(default) if default is not None else variants[0])


def default_of(cls: type, name: str) -> object:
    """The default of a field, `dataclasses.MISSING` if it has none."""
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
    for name, annotation in fields_of(cls).items():
        key, default = f"{prefix}{name}", default_of(cls, name)
        here = values.get(name) if isinstance(values, Mapping) else None
        if variants := variants_of(annotation):
            if default is None and here is None and not everything:  # an optional part that is left out
                yield key, None
            for variant in variants if everything else [variant_for(variants, default, here)]:
                yield from _leaves(variant, f"{key}.", here, everything)
        elif (item := item_type(annotation)) is not None:
            if inner := variants_of(item):
                yield from _leaves(inner[0], f"{key}.{FREE}.", None, everything)
            else:
                yield f"{key}.{FREE}", dataclasses.MISSING
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
            done.append(FREE)
            classes, item = variants_of(item), None
        else:
            owner = next((cls for cls in classes if part in fields_of(cls)), None)
            if owner is None:
                return None
            done.append(part)
            annotation, default = fields_of(owner)[part], default_of(owner, part)
            here = here.get(part) if isinstance(here, Mapping) else None
            item = item_type(annotation)
            classes = variants_of(annotation)
            if len(classes) > 1 and values is not None:
                classes = [variant_for(classes, default, here)]
        if not classes and item is None and i + 1 < len(parts):
            return None
    return ".".join(done)


def optional(key: str) -> bool:
    """May this key hold nothing (`null`)? Of keys that exist for several kinds, one that may is enough."""
    return _is_optional(config.RunConfig, key.split("."))


def _is_optional(cls: type, parts: list[str]) -> bool:
    annotation = fields_of(cls).get(parts[0])
    if annotation is None:
        return False
    if len(parts) == 1:
        return type(None) in typing.get_args(plain(annotation))
    return any(_is_optional(inner, parts[1:]) for inner in variants_of(annotation))


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
