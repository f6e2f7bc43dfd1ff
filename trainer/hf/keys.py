"""config.json read key by key: what is missing, wrong, or asked for by nobody is refused by name. Torch-free.

Two rules. A key that the weights cannot prove (eps, theta, window, caps) must be there: the default of a class in some
version of a library is no fact about a model. And a key that nobody here understands is never passed over.
"""

from collections.abc import Mapping
from typing import Any

from officina.trainer.errors import ConfigError, Problem

Values = dict[str, Any]

HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attn_implementation bos_token_id
    cache_implementation dtype eos_token_id gradient_checkpointing id2label label2id max_position_embeddings model_type
    output_attentions output_hidden_states pad_token_id return_dict task_specific_params tokenizer_class torch_dtype
    torchscript transformers_version unsloth_fixed unsloth_version use_cache
""".split())
"""Keys that do not change what the model computes; an export carries them on."""
ROPE_SCALING = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
"""Their name of a RoPE type -> ours."""
_MISSING = object()


class Keys:
    """The keys of one config.json. Faults are collected; `close` raises them all at once."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source
        self.problems: list[Problem] = []
        self._read = set(HARMLESS)

    def need(self, key: str, *, null: Any = _MISSING) -> Any:
        """The value, which must be there; `null`: what a null stands for, if a null is allowed."""
        self._read.add(key)
        if key not in self.raw:
            self.refuse(key, None, "is not in the file, and the weights cannot prove it; a class's default is no fact "
                        "about a model", f"add it to the file, from the model's card: \"{key}\": VALUE")
            return None
        value = self.raw[key]
        if value is None:
            if null is _MISSING:
                self.refuse(key, "null", "has no value", f"write the value into the file: \"{key}\": VALUE")
            return None if null is _MISSING else null
        return value

    def may(self, key: str, absent: Any) -> Any:
        """The value, or `absent` where it is not there or null: for what the tensors' names and shapes prove anyway."""
        self._read.add(key)
        value = self.raw.get(key)
        return absent if value is None else value

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse any value but these; the key may be absent if None is among them."""
        self._read.add(key)
        value = self.raw.get(key)
        if value not in allowed or isinstance(value, bool) != any(isinstance(a, bool) for a in allowed if a == value):
            self.refuse(key, value, why, f"a model with \"{key}\": {_json(allowed[0])}")

    def skip(self, *keys: str) -> None:
        """Keys that say nothing more once others were read."""
        self._read.update(keys)

    def refuse(self, key: str, value: object, rule: str, remedy: str) -> None:
        self.problems.append(Problem(key, value, rule, remedy))

    def close(self) -> None:
        """Raise ConfigError with every fault; keys that nobody asked for are faults."""
        for key in sorted(self.raw.keys() - self._read):
            self.refuse(key, _json(self.raw[key]), "is not known to officina for this kind of model, and may change what "
                        "the model computes", f"if it does not, remove \"{key}\" from the file")
        if self.problems:
            raise ConfigError(self.problems, source=self.source)

    # ---- RoPE ------------------------------------------------------------------------------------------------------
    def rope(self, layer_type: str = "", theta_key: str = "rope_theta", scaling_key: str | None = "rope_scaling") -> Values:
        """Values of a RopeConfig, from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`.

        layer_type: the part of a nested `rope_parameters`. scaling_key None: layers whose RoPE was never scaled.
        """
        if "rope_parameters" in self.raw:
            if scaling_key and self.raw.get(scaling_key):
                self.refuse(scaling_key, _json(self.raw[scaling_key]), "stands beside rope_parameters, in whose place "
                            "transformers takes it", "one of the two: in rope_parameters, with rope_theta, if it is meant")
            self.skip("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
            given = self.raw["rope_parameters"] or {}
            name = "rope_parameters"
            if layer_type:
                given, name = given.get(layer_type), f"rope_parameters.{layer_type}"
            if not isinstance(given, Mapping):
                self.refuse(name, _json(given), "has to be a set of keys", f"\"{name.rpartition('.')[2]}\": "
                            "{\"rope_type\": \"default\", \"rope_theta\": 10000.0}")
                return {}
            if any(isinstance(value, Mapping) for value in given.values()):
                self.refuse(name, _json(given), "differs between layer types, which this kind of model does not have",
                            "one set of keys for all layers")
                return {}
            given, theta = dict(given), given.get("rope_theta")
            given.pop("rope_theta", None)
            if theta is None:
                self.refuse(f"{name}.rope_theta", None, "is not in the file", "add it, from the model's card")
        else:
            theta, name = self.need(theta_key), scaling_key or ""
            given = dict(self.may(scaling_key, {})) if scaling_key else {}
        return {"theta": float(theta or 1), **self._scaling(name, given)}

    def _scaling(self, name: str, given: Values) -> Values:
        kind = given.pop("rope_type", given.pop("type", "default") if "rope_type" not in given else "")
        given.pop("type", None)  # files of a time of change say both
        if kind not in ROPE_SCALING:
            self.refuse(f"{name}.rope_type", kind, "is not known to officina", f"a model with one of {', '.join(ROPE_SCALING)}")
            return {}
        wanted = {"default": {}, "linear": {"factor": "factor"},
                  "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor",
                             "high_freq_factor": "high_freq_factor", "original_seq_len": "original_max_position_embeddings"},
                  "yarn": {"factor": "factor", "original_seq_len": "original_max_position_embeddings"}}[kind]
        if given.get("partial_rotary_factor") == 1:
            given.pop("partial_rotary_factor")
        values: Values = {"scaling": ROPE_SCALING[kind]}
        for ours, theirs in wanted.items():
            if given.get(theirs) is None:
                self.refuse(f"{name}.{theirs}", None, f"is not in the file, and rope_type {kind} needs it",
                            "add it, from the model's card")
            else:
                values[ours] = given[theirs]
        for ours, theirs in {"beta_fast": "beta_fast", "beta_slow": "beta_slow",
                             "attention_factor": "attention_factor"}.items() if kind == "yarn" else ():
            if given.get(theirs) is not None:
                values[ours] = given[theirs]
            wanted = {**wanted, ours: theirs}
        if kind == "yarn" and given.get("truncate") is True:
            given.pop("truncate")
        for key in sorted(key for key in given.keys() - set(wanted.values()) if given[key] is not None):
            self.refuse(f"{name}.{key}", _json(given[key]), f"is not known to officina for rope_type {kind}",
                        f"if it does not change the angles, remove \"{key}\" from the file")
        return values


def rope_as_written(rope: Any) -> tuple[float, Values | None]:
    """`rope_theta` and `rope_scaling` of a RopeConfig, as transformers 4 has them."""
    if rope.scaling == "none":
        return rope.theta, None
    scaling: Values = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_seq_len
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return rope.theta, scaling


def _json(value: object) -> str:
    import json

    text = json.dumps(value, default=str)
    return text if len(text) < 80 else text[:76] + " ..."
