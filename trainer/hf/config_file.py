"""config.json to DecoderConfig and back. Torch-free."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from officina.trainer.config import DecoderConfig
from officina.trainer.errors import ConfigError, OfficinaError, Problem
from officina.trainer.hf.apertus import APERTUS
from officina.trainer.hf.family import Family, canonical
from officina.trainer.hf.gemma import GEMMA2, GEMMA3
from officina.trainer.hf.keys import Keys, Values
from officina.trainer.hf.llama import LLAMA
from officina.trainer.hf.mistral import MISTRAL
from officina.trainer.hf.olmo2 import OLMO2
from officina.trainer.hf.qwen import QWEN2, QWEN3
from officina.trainer.hf.smollm3 import SMOLLM3
from officina.trainer.schema import read_run

FAMILIES = {family.model_type: family
            for family in (LLAMA, MISTRAL, QWEN2, QWEN3, APERTUS, SMOLLM3, OLMO2, GEMMA2, GEMMA3)}
"""By `model_type`; the first that fits is what a model that came from nowhere is exported as."""
CONFIG_FILE = "config.json"


def load_raw(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is. OfficinaError if it is no such thing."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OfficinaError(f"{path} does not exist, so {folder} is no model in Hugging Face's form. Name the folder that "
                            "holds config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise OfficinaError(f"{path} cannot be read: {error}. Copy it anew from where the model came from") from error
    if not isinstance(raw, dict):
        raise OfficinaError(f"{path} holds {type(raw).__name__}, not a set of keys. Copy it anew from its origin")
    return raw


def read_config(raw: Mapping[str, Any], source: str = CONFIG_FILE, *,
                has_head: bool | None = None) -> tuple[Family, DecoderConfig]:
    """The family and the model that the keys describe; ConfigError with every key that is missing, wrong or unknown.

    has_head: do the weights hold an `lm_head`? It decides where the keys do not say whether the embeddings are tied.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError([Problem("model_type", kind, f"is not among the families that officina reads: {', '.join(FAMILIES)}",
                                   "a model of one of them")], source=source)
    family, keys = FAMILIES[kind], Keys(raw, source)
    named = raw.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        keys.refuse("architectures", named, f"is not the language model of {kind}", f"[\"{family.architecture}\"]")
    values = family.read(keys)
    if "tie_embeddings" not in values and has_head is not None:
        values["tie_embeddings"] = not has_head
    elif "tie_embeddings" not in values:
        keys.need("tie_word_embeddings")
    keys.close()
    run, problems = read_run({"model": {"kind": "decoder", **values}})
    if problems:
        raise ConfigError([Problem(p.key, p.value, p.rule, "the value of the model's own file") for p in problems],
                          source=source)
    return family, run.model


def family_for(model: DecoderConfig, base: Mapping[str, Any] | None = None) -> Family:
    """The family that can hold this model: that of `base`, the config.json it came from, else the first whose keys give the
    very model back."""
    kind = base["model_type"] if base else None
    if base and describes(base, model):
        return FAMILIES[kind]
    families = sorted(FAMILIES.values(), key=lambda family: family.model_type != kind)
    near, lost = min(((family, _lost(family, model)) for family in families), key=lambda pair: len(pair[1]))
    if not lost:
        return near
    raise OfficinaError(f"no family of Hugging Face's models has this combination of switches; {near.model_type}, the "
                        f"nearest, cannot hold {', '.join(f'model.{name}' for name in lost)}. Families: {', '.join(FAMILIES)}. "
                        "Choose switches of one of them before training: docs/convert.md")


def write_config(model: DecoderConfig, family: Family, *, base: Mapping[str, Any] | None = None, dtype: str = "bfloat16",
                 max_seq_len: int = 0) -> Values:
    """config.json's keys. With `base`, the file that the model came from: that file, with only what changed in it.

    Without one, or where another family must hold what changed: transformers 4's form, which its later versions read too.
    max_seq_len: tokens for max_position_embeddings where `base` does not say.
    """
    if base is not None and describes(base, model):
        return dict(base)
    values = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(model)}
    if base is not None and base["model_type"] == family.model_type:
        values = _in_form_of(base, values)
        return {**base, **{key: value for key, value in values.items() if key in base or value is not None}}
    base = base or {}
    reach = base.get("max_position_embeddings") or max_seq_len or round(model.rope.original_seq_len * model.rope.factor)
    ids = {key: base.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}  # said, or the class's own are taken
    return values | ids | {"max_position_embeddings": reach, "torch_dtype": dtype, "use_cache": True}


def describes(base: Mapping[str, Any], model: DecoderConfig) -> bool:
    """Is `base`, a config.json, one of this very model?"""
    return canonical(read_config(base, has_head=not model.tie_embeddings)[1]) == canonical(model)


def _in_form_of(base: Mapping[str, Any], values: Values) -> Values:
    """The keys in the form of transformers 5, if the file has it."""
    if "rope_parameters" not in base:
        return values
    values = dict(values)
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling") or {"rope_type": "default"}
    rope = {"rope_theta": theta, **scaling}
    if "rope_local_base_freq" in values:
        local = {"rope_theta": values.pop("rope_local_base_freq"), "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    return values | {"rope_parameters": rope}


def _lost(family: Family, model: DecoderConfig) -> list[str]:
    """Fields that do not come back when the model is written as this family and read again."""
    written = {"model_type": family.model_type, **family.write(model)}
    try:
        back = canonical(read_config(written)[1])
    except ConfigError as error:
        return [problem.key for problem in error.problems] * 99
    wanted = canonical(model)
    return [name for name in DecoderConfig.__dataclass_fields__ if getattr(back, name) != getattr(wanted, name)]
