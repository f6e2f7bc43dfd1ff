"""From the configuration to a module without values, its first values, its loss and its decoder."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from officina.kernels.attention import flex_missing
from officina.kernels.dispatch import why_not_triton_on
from officina.kernels.flash_attention import why_not_flash
from officina.trainer.batch import LossFn
from officina.trainer.config import CustomModelConfig, DecoderConfig, LoraConfig, RunConfig
from officina.trainer.errors import ConfigError, Problem
from officina.trainer.model.init import FillSource, InitSource, ValuesSource
from officina.trainer.model.lora import AdapterSource, adapter_fills, add_lora
from officina.trainer.model.nf4 import PackedSource
from officina.trainer.model.targets import adapter_problems
from officina.trainer.model.transformer import Transformer
from officina.trainer.objective import dpo_loss, next_token_loss, record_loss
from officina.trainer.state import Source

Decode = Callable[[bytes], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Built:
    """All that the model part of a configuration turns into."""

    module: nn.Module
    """Parameters and saved buffers on the meta device."""
    first: Source
    """First values of all parameters and saved buffers but the adapters'."""
    loss_fn: LossFn
    decode: Decode | None
    """Custom models: from one record's bytes to its fields. None for the decoder-only transformer."""
    adapters: FillSource | None = None
    """First values of the adapters, which no base model holds. None: there are none."""
    frozen: tuple[str, ...] = ()
    """Parameters that an adapter leaves as they are."""
    packed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Those of them that the module holds in 4 bits -> (n_out, n_in)."""

    def held(self, values: Source) -> Source:
        """`values` in the form in which the module holds them, for an engine to read."""
        return PackedSource(values, self.packed) if self.packed else values

    @property
    def source(self) -> Source:
        """First values of all that the module holds."""
        return self.held(AdapterSource(self.first, self.adapters) if self.adapters else self.first)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all parameters; of one that is held in 4 bits that of its values."""
        return {name: tuple(self.packed.get(name, p.shape)) for name, p in self.module.named_parameters()}

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that have a gradient."""
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]


def build_model(run: RunConfig) -> Built:
    """Build the model of `run`, the same on every rank; ConfigError names the key that has to change."""
    if isinstance(run.model, CustomModelConfig):
        return _build_custom(run.model, run.seed)
    check_attention(run.model, run.device)
    check_kernels(run.model, run.device)
    module = build_transformer(run.model)
    first = InitSource(module, run.model, run.seed)
    if not isinstance(run.adapter, LoraConfig):
        return Built(module, first, _loss(run), None)
    if problems := list(adapter_problems(run)):
        raise ConfigError(problems)
    chosen = add_lora(module, run.model, run.adapter)
    adapters = adapter_fills(chosen, run.adapter.rank, run.seed)
    return Built(module, first, _loss(run), None, adapters, chosen.frozen, chosen.packed)


def _loss(run: RunConfig) -> LossFn:
    if run.objective.kind == "dpo":
        return dpo_loss(run.objective.beta)
    return next_token_loss(run.objective.z_loss)


def build_transformer(config: DecoderConfig) -> Transformer:
    """The decoder-only transformer on the meta device."""
    with torch.device("meta"):
        return Transformer(config)


def check_attention(config: DecoderConfig, device: str) -> None:
    """Refuse a named attention implementation that cannot do this model on `device` (auto, cpu or cuda)."""
    key, remedy = "model.attention_impl", "model.attention_impl=auto"
    if config.attention_impl == "sdpa" and config.attn_softcap:
        rule = f"has no softcap, and model.attn_softcap={config.attn_softcap}"
        raise ConfigError([Problem(key, "sdpa", rule, remedy)])
    if config.attention_impl == "flex" and (why := flex_missing(_device(device), config.head_size)):
        raise ConfigError([Problem(key, "flex", f"cannot run here: {why}", remedy)])
    if config.attention_impl == "triton" and (why := why_not_flash(config.head_size, torch.float32, _device(device))):
        raise ConfigError([Problem(key, "triton", f"cannot run here: {why}", remedy)])


def check_kernels(config: DecoderConfig, device: str) -> None:
    """Refuse Triton kernels by name where they cannot run on `device` (auto, cpu or cuda)."""
    if config.kernels == "triton" and (why := why_not_triton_on(_device(device))):
        raise ConfigError([Problem("model.kernels", "triton", f"cannot run here: {why}", "model.kernels=auto")])


def _device(device: str) -> torch.device:
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def resolve(path: str, key: str) -> Callable[..., Any]:
    """The callable that `path`, the value of the configuration key `key`, names as `package.module:name`."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        rule = "is not of the form package.module:name"
        raise ConfigError([Problem(key, path, rule, f"{key}=my_model:build")])
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises when imported
        raise ConfigError([Problem(
            key, path, f"{module_name} cannot be imported: {type(error).__name__}: {error}",
            f"put its folder on PYTHONPATH; `python -c 'import {module_name}'` must work")]) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        there = sorted(n for n, v in vars(importlib.import_module(module_name)).items()
                       if callable(v) and not n.startswith("_"))
        raise ConfigError([Problem(
            key, path, f"{module_name} has no callable {name} ({_kind(found)} found)",
            f"{key}={module_name}:{there[0]}" if there else f"define {name} in {module_name}")])
    return found


def _build_custom(config: CustomModelConfig, seed: int) -> Built:
    factory = resolve(config.factory, "model.factory")
    losses_of, decode = resolve(config.loss, "model.loss"), resolve(config.decoder, "model.decoder")
    try:
        inspect.signature(factory).bind(**config.args)
    except TypeError as error:
        rule = f"{config.factory} does not take them: {error}"
        remedy = f"the arguments of {config.factory}{inspect.signature(factory)}"
        raise ConfigError([Problem("model.args", config.args, rule, remedy)]) from error
    with torch.random.fork_rng(devices=[]):  # the factory's draws must not shift anyone else's
        torch.manual_seed(seed)
        module = factory(**config.args)
    if not isinstance(module, nn.Module):
        rule = f"returned {_kind(module)}, not an nn.Module"
        raise ConfigError([Problem("model.factory", config.factory, rule, "return the module to be trained")])
    saved = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if on_meta := [name for name, value in saved.items() if value.is_meta]:
        rule = f"left {on_meta[0]} on the meta device, without values"
        raise ConfigError([Problem("model.factory", config.factory, rule, "build the module on the CPU")])
    if complex_ones := [name for name, parameter in module.named_parameters() if parameter.is_complex()]:
        rule = f"gave the complex parameter {complex_ones[0]}; what a run trains and saves is real"
        remedy = "keep torch.view_as_real of it as the parameter, and torch.view_as_complex in forward"
        raise ConfigError([Problem("model.factory", config.factory, rule, remedy)])
    saved |= {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    _to_meta(module)
    return Built(module, ValuesSource(saved), record_loss(losses_of, config.loss), decode)


def _to_meta(module: nn.Module) -> None:
    """Like `module.to("meta")`, but what two modules share stays one, and buffers that are not saved keep the values that
    the constructor gave them."""
    moved: dict[Tensor, Tensor] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                child._parameters[name] = moved[parameter]
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = moved.setdefault(buffer, buffer.to("meta"))


def _kind(found: object) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"
