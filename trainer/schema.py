"""From plain values (YAML, words on the command line) to a RunConfig, with every fault named and mended.

Knows the keys and their types; knows no rule between keys (`officina.trainer.validate`). Torch-free.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from functools import cache

from pydantic import TypeAdapter, ValidationError

from officina.trainer import config
from officina.trainer.errors import Problem
from officina.trainer.keys import (
    EXAMPLES,
    FREE,
    GROUPS,
    Values,
    as_text,
    default_of,
    fields_of,
    generic,
    item_type,
    kind_of,
    leaves,
    lookup,
    plain,
    variant_for,
    variants_of,
    word,
)

ENTRIES = {"data.stages": "[{from_step: 900, weights: {NAME: 1}}]"}
"""Lists whose entries have keys -> one that would do."""
_OWN = ("data.timeline", "data.planned_at")
"""Written by officina: nobody means them."""
_SYNONYMS = {
    "learning_rate": "optim.lr", "grad_clip": "optim.clip_norm", "max_grad_norm": "optim.clip_norm",
    "batch_size": "batch.micro_rows", "micro_batch_size": "batch.micro_rows", "global_batch_size": "batch.global_tokens",
    "context_length": "batch.seq_len", "max_seq_len": "batch.seq_len", "block_size": "batch.seq_len",
    "max_steps": "steps", "train_steps": "steps", "warmup": "lr_schedule.warmup_steps", "dtype": "precision",
    "hidden_size": "model.d_model", "num_layers": "model.n_layers", "num_heads": "model.n_heads"}
"""What others call a key."""


ARGUMENT = "must be a number, a word, true, false, null, or a list of them such as [0.9,0.95]"
"""Rule of each of `model.args`, of whose types pydantic names the first."""


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(config.RunConfig)


# ---- unknown keys ------------------------------------------------------------------------------------------
def unknown_key(key: str, value: object, values: Mapping) -> Problem:
    """The Problem of a key that does not exist, with the key that was probably meant."""
    declared = generic(key)
    if declared is not None:
        return _other_kind(key, value, declared, values)
    known = {name: default for name, default in leaves(values).items() if name not in _OWN}
    if key in _SYNONYMS and _SYNONYMS[key] in known:
        return Problem(key, value, "there is no such key", word(_SYNONYMS[key], value))
    stem, _, leaf = key.rpartition(".")
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    tops = difflib.get_close_matches(key, [*GROUPS, *(k for k in known if "." not in k)], 1, 0.55)
    if "." not in key and tops and tops[0] in GROUPS and isinstance(value, str) and not same_leaf:
        return Problem(key, value, "there is no such key", word(tops[0], value))
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
    elsewhere = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in leaves() if k not in _OWN], 1, 0.75)
    if elsewhere:  # a key of a kind that is not chosen
        meant = next(k for k in leaves() if k.rpartition(".")[2] == elsewhere[0])
        found = _other_kind(_with_names(meant, key), value, meant, values)
        return Problem(key, value, f"there is no such key; {meant} belongs to another kind", found.remedy)
    there = sorted({k.removeprefix(f"{stem}.").split(".")[0] for k in known if not stem
                    or k.startswith(f"{stem}.")})
    where = f"the keys of {stem} are" if stem and there else "the top keys are"
    there = there or sorted({k.split(".")[0] for k in known})
    return Problem(key, value, "there is no such key", f"leave it out; {where} {', '.join(there)}")


def _closest(leaf: str, key_of: dict[str, str]) -> list[str]:
    return [key_of[near] for near in difflib.get_close_matches(leaf, list(key_of), 1, 0.6)]


def _with_names(declared: str, typed: str) -> str:
    """`data.sources.*.path` with the name the user typed at that place, else NAME."""
    names, parts = typed.split("."), declared.split(".")
    aligned = len(names) == len(parts)
    return ".".join((names[i] if aligned and names[i] else "NAME") if part == FREE else part for i, part in enumerate(parts))


def _other_kind(key: str, value: object, declared: str, values: Mapping) -> Problem:
    """The key exists, but not for the kind that is chosen: `engine.stage` under engine=fsdp2."""
    part = declared.split(".")[0]
    name = declared.split(".")[1]
    annotation = fields_of(config.RunConfig)[part]
    chosen = variant_for(variants_of(annotation), default_of(config.RunConfig, part), values.get(part))
    kinds = [kind_of(cls) for cls in variants_of(annotation) if name in fields_of(cls)]
    if name == "stage" and str(value) in "123":
        remedy = f"{part}=zero{value}"
    else:
        remedy = f"{part}={'zero3' if kinds[0] == 'zero' else kinds[0]} {word(key, value)}"
    return Problem(key, value, f"{part}={kind_of(chosen)} has no {name}; {', '.join(kinds)} has it", remedy)


# ---- reading -----------------------------------------------------------------------------------------------
def read_run(values: Values, *, good: Mapping | None = None) -> tuple[config.RunConfig, list[Problem]]:
    """The run that `values` describe, and every fault of type, range or spelling in them.

    With faults, the run has defaults in their place, so that the rules between the other keys can still be checked; it
    must not be used for anything else. `good`: values to prefer over defaults in remedies.
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
    values = _copy(values)
    for name, annotation in fields_of(config.RunConfig).items():
        variants = variants_of(annotation)
        if len(variants) > 1 and isinstance(part := values.get(name, {}), dict):
            values[name] = {"kind": kind_of(type(default_of(config.RunConfig, name)))} | part
    return values


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
        classes = variants_of(annotation)
        item = item_type(annotation)
        if isinstance(part, int) or not isinstance(here, Mapping) or not (classes or item):  # below a leaf: types tried
            break
        parts.append(str(part))
        here = here.get(part)
        if classes:
            annotation = next((fields_of(cls)[part] for cls in classes if part in fields_of(cls)), None)
        else:
            annotation = item
        if annotation is None:
            break
        if len(variants_of(annotation)) > 1 and rest and any(rest[0] == kind_of(cls) for cls in variants_of(annotation)):
            tag = rest.pop(0)  # the union tag; go on within that variant
            annotation = next(cls for cls in variants_of(annotation) if kind_of(cls) == tag)
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
    if key in ENTRIES and (place := _in_entry(item["loc"])):
        number, name = place
        if kind in ("missing", "missing_argument"):
            rule = f"has no {name}"
        elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
            rule = f"has {name}, which no entry has"
        else:
            rule = f"has a {name} that {_rule(kind, ctx, item['msg'])}"
        if not name:
            rule = "is no set of keys"
        return Problem(key, value, f"entry {number + 1} {rule}", f"{key}={ENTRIES[key]}")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, value, values)
    declared = generic(key, values) or key
    if kind.startswith("union_tag"):
        return _bad_kind(key, value)
    if kind in ("missing", "missing_argument"):
        return Problem(key, None, "is required", word(key, EXAMPLES.get(declared, "VALUE")))
    if kind in ("dataclass_type", "dataclass_exact_type", "model_attributes_type", "dict_type"):
        first = next((k for k in leaves() if k.startswith(f"{declared}.") and not k.endswith(".kind")), None)
        if first is None:  # an entry of a list whose entries have keys
            return Problem(key, value, "must be a list of {name:value}", word(key, leaves()[declared]))
        default = leaves()[first]
        example = EXAMPLES.get(first, "VALUE") if default is dataclasses.MISSING else default
        return Problem(key, value, "is a group of keys, not a value",
                       word(first.replace(f"{declared}.", f"{key}.", 1).replace(FREE, "NAME"), example))
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
        if isinstance(value, float):  # how it was written is not known any more: 1e5 is 100000.0 here
            return Problem(key, value, "must be text; within YAML or {...} write numbers in quotes", f"{key}=VALUE in quotes")
        return Problem(key, value, "must be text; within YAML or {...} write numbers in quotes",
                       word(key, as_text(value) if isinstance(value, int) else fallback))
    rule = ARGUMENT if declared == f"model.args.{FREE}" else _rule(kind, ctx, item["msg"])
    return Problem(key, value, rule, word(key, fallback))


def _in_entry(loc: tuple[int | str, ...]) -> tuple[int, str] | None:
    """Which entry of a list pydantic's location is in, and the key there; empty for the entry itself."""
    at = next((i for i, part in enumerate(loc) if isinstance(part, int)), None)
    return None if at is None else (int(loc[at]), ".".join(map(str, loc[at + 1:])))


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
    variants = variants_of(fields_of(cls)[key])
    default = default_of(cls, key)
    kinds = [kind_of(variant) for variant in variants]
    got = value.get("kind") if isinstance(value, Mapping) else value
    near = difflib.get_close_matches(str(got), kinds, 1, 0.5)
    return Problem(f"{key}.kind", got, f"must be one of {', '.join(kinds)}", f"{key}.kind={near[0] if near else default.kind}")


def _literals(declared: str, values: Mapping) -> list[str]:
    """The options of a Literal field."""
    annotation: object = config.RunConfig
    here: object = values
    for part in declared.split("."):
        classes = variants_of(annotation)
        here_kind = here
        if len(classes) > 1:
            classes = [variant_for(classes, None, here_kind)]
        annotation = fields_of(classes[0])[part] if classes else item_type(annotation)
        here = here.get(part) if isinstance(here, Mapping) else None
    return [str(option) for option in typing.get_args(plain(annotation))]
