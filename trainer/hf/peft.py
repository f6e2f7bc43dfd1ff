"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors. Torch-free.

Which layers an adapter is for is told by its tensors, whatever `target_modules` says: a list, a regular expression,
`all-linear`, some layers only. Source: peft's LoraConfig and `get_peft_model_state_dict`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from officina.trainer.config import DecoderConfig, LoraConfig
from officina.trainer.errors import OfficinaError, listed
from officina.trainer.hf.base import ADAPTER_FILE
from officina.trainer.hf.family import Family
from officina.trainer.hf.files import ITEM_BYTES, Stored, read_header
from officina.trainer.hf.keys import Keys
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import LORA_A, LORA_B, Chosen, choose, linear_layers

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILE, "adapter_model.safetensors"
PREFIX = "base_model.model."
_OFF = (None, False, {}, [])
_REFUSED = {
    "use_dora": "DoRA", "rank_pattern": "another rank for some layers", "alpha_pattern": "another alpha for some layers",
    "lora_bias": "a bias in the adapter", "trainable_token_indices": "training of single tokens",
    "target_parameters": "adapters of parameters that are no linear layer's", "layer_replication": "layers that are used twice",
    "fan_in_fan_out": "transposed weights", "use_qalora": "QALoRA", "alora_invocation_tokens": "adapters from some token on",
}
"""Keys of what officina's adapters do not have."""
_TOLD_BY_TENSORS = ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern",
                    "ensure_weight_tying")
_HARMLESS = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
             "qalora_group_size", "eva_config", "runtime_config")
_LEAVES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}


def peft_name(ours: str, family: Family) -> str:
    """What PEFT's file calls a parameter: of an adapter, or of a module trained in full."""
    owner, _, leaf = family.their_name(ours).rpartition(".")
    return f"{PREFIX}{owner}.{_LEAVES.get(leaf, leaf)}"


def peft_config(model: DecoderConfig, adapter: LoraConfig, chosen: Chosen, family: Family, base: str) -> dict[str, Any]:
    """adapter_config.json. base: name of the model the adapter belongs to."""
    whole = dict.fromkeys(_module(name, family) for name in chosen.whole)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "lora_dropout": adapter.dropout,
        "target_modules": _shortest(_modules(chosen.linears, family), _modules(linear_layers(model), family)),
        "modules_to_save": list(whole) or None,
        # Both ends of a tied model are one matrix; without this PEFT gives the copy it trains to one end only.
        "ensure_weight_tying": model.tie_embeddings and "embed.weight" in chosen.whole,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
    }


def _module(parameter: str, family: Family) -> str:
    return family.their_name(parameter).rpartition(".")[0]


def _modules(layers: Iterable[str], family: Family) -> list[str]:
    return [_module(f"{name}.weight", family) for name in layers]


def _shortest(chosen: Iterable[str], there: Iterable[str]) -> list[str]:
    """Last names (`q_proj`) where they say what is meant, since a name stands for all that end with it; else names in full."""
    chosen = list(chosen)
    ends = dict.fromkeys(name.rpartition(".")[2] for name in chosen)
    return list(ends) if {name for name in there if name.rpartition(".")[2] in ends} == set(chosen) else chosen


# ---- in ------------------------------------------------------------------------------------------------------------
def load_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The folder's adapter_config.json and where its tensors lie. OfficinaError if it is no adapter of PEFT."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OfficinaError(f"{path} cannot be read: {error}. Name a folder that PEFT wrote") from error
    if not (Path(folder) / WEIGHTS_FILE).exists() and (Path(folder) / "adapter_model.bin").exists():
        raise OfficinaError(f"{folder} has adapter_model.bin, which is a pickle and may run code when it is opened. Convert it "
                            "where you trust it: PeftModel.from_pretrained(...).save_pretrained(FOLDER)")
    return raw, read_header(Path(folder) / WEIGHTS_FILE)


def read_adapter(raw: Mapping[str, Any], tensors: Mapping[str, Stored], model: DecoderConfig, family: Family,
                 folder: Path) -> tuple[LoraConfig, dict[str, Stored]]:
    """The adapter of `folder` for `model`, and where each of its parameters lies by our names.

    Raises ConfigError for keys of what officina does not have, OfficinaError for tensors that do not fit the model.
    """
    keys = Keys(raw, str(Path(folder) / CONFIG_FILE))
    keys.only("peft_type", "LORA", why="is another kind of adapter")
    keys.only("task_type", "CAUSAL_LM", None, why="is not for a language model")
    keys.only("bias", "none", None, why="trains biases beside the adapters, which officina's do not")
    keys.only("init_lora_weights", True, False, None, "gaussian", "eva", "orthogonal",
              why="changes the base too: this adapter belongs to another model than the one it names. In PEFT, "
              "save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a plain one of it")
    for key, what in _REFUSED.items():
        keys.only(key, *_OFF, why=f"is {what}, which officina's adapters do not have; merge it in PEFT, and start from that")
    rank, alpha = keys.need("r"), keys.need("lora_alpha")
    rslora, dropout = keys.may("use_rslora", False), keys.may("lora_dropout", 0.0)
    keys.skip(*_TOLD_BY_TENSORS, *_HARMLESS, *(key for key, value in raw.items() if value in _OFF))
    keys.close()

    shapes, linears = parameter_shapes(model), linear_layers(model)
    there = {peft_name(name, family): name for name in (*shapes, *(f"{n}.{leaf}" for n in linears for leaf in _LEAVES))}
    tensors = _untied(tensors, model, there)
    found = {there[name]: stored for name, stored in tensors.items() if name in there}
    layers = [name for name in linears if any(f"{name}.{leaf}" in found for leaf in _LEAVES)]
    whole = [name for name in shapes if name in found]
    owners, modules = (dict.fromkeys(name.rpartition(".")[0] for name in names) for names in (whole, shapes))
    adapter = LoraConfig(rank=rank, alpha=float(alpha), rslora=bool(rslora), dropout=float(dropout),
                         targets=LoraConfig().targets if layers == list(linears) else _shortest(layers, linears),
                         train=_shortest(owners, modules))
    chosen = choose(model, adapter)
    wanted = {**chosen.adapter_shapes(rank), **{name: shapes[name] for name in chosen.whole}}
    faults = [f"{name} is no part of this model" for name in sorted(tensors.keys() - there.keys())]
    faults += [f"{peft_name(name, family)} is missing" for name in wanted if name not in found]
    faults += [f"{peft_name(name, family)} is {list(found[name].shape)} there and {list(shape)} for this model"
               for name, shape in wanted.items() if name in found and found[name].shape != tuple(shape)]
    faults += [f"{name} is stored as {stored.dtype}, and weights are read as {', '.join(ITEM_BYTES)}"
               for name, stored in tensors.items() if stored.dtype not in ITEM_BYTES]
    faults += [] if found else ["it holds no tensor of an adapter"]
    if faults:
        raise OfficinaError(f"{Path(folder) / WEIGHTS_FILE} is not an adapter of this model:\n  " + listed(faults) +
                            "\nName the model that it was trained on: --base FOLDER")
    return adapter, {name: found[name] for name in wanted}


def _untied(tensors: Mapping[str, Stored], model: DecoderConfig, there: Mapping[str, str]) -> dict[str, Stored]:
    """Without the second copy of a tied matrix, which PEFT writes at both ends."""
    head, embed = f"{PREFIX}lm_head.weight", next(theirs for theirs, ours in there.items() if ours == "embed.weight")
    if not model.tie_embeddings or not {head, embed} <= tensors.keys():
        return dict(tensors)
    if read_bytes(tensors[head]) != read_bytes(tensors[embed]):
        raise OfficinaError(f"{tensors[head].file}: the two ends of the tied embedding were trained apart, and in officina "
                            "they are one matrix. Merge it in PEFT, with tie_word_embeddings=false")
    return {name: stored for name, stored in tensors.items() if name != head}


def read_bytes(stored: Stored) -> bytes:
    """A tensor's bytes as they are in its file."""
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        return file.read(stored.bytes)
