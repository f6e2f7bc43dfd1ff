"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors. Torch-free.

Source: peft's LoraConfig and `get_peft_model_state_dict`.
"""

from collections.abc import Iterable
from typing import Any

from officina.trainer.config import DecoderConfig, LoraConfig
from officina.trainer.hf.family import Family
from officina.trainer.model.targets import LORA_A, LORA_B, Chosen, linear_layers

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
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
        "target_modules": _shortest(chosen.linears, linear_layers(model), family), "modules_to_save": list(whole) or None,
        # Both ends of a tied model are one matrix; without this PEFT gives the copy it trains to one end only.
        "ensure_weight_tying": model.tie_embeddings and "embed.weight" in chosen.whole,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
    }


def _module(parameter: str, family: Family) -> str:
    return family.their_name(parameter).rpartition(".")[0]


def _shortest(chosen: Iterable[str], there: Iterable[str], family: Family) -> list[str]:
    """Last names (`q_proj`) where they say what is meant, since PEFT takes a name as an end; else the names in full."""
    named = [_module(f"{name}.weight", family) for name in chosen]
    ends = dict.fromkeys(name.rpartition(".")[2] for name in named)
    matched = {other for name in there if (other := _module(f"{name}.weight", family)).rpartition(".")[2] in ends}
    return list(ends) if matched == set(named) else named
