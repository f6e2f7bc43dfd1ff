"""Which layers get an adapter and which modules are trained in full: patterns against the layers there are. No torch.

A pattern is a name or the end of one at a dot, `*` stands for anything: `attn.q`, `blocks.3.mlp.*`, `*norm`.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from officina.trainer.config import AdapterConfig, CustomModelConfig, DecoderConfig, LoraConfig, MuonConfig, RunConfig
from officina.trainer.errors import Problem
from officina.trainer.keys import as_text
from officina.trainer.model.shapes import NF4_BLOCK, parameter_shapes

LORA_A, LORA_B = "lora_a", "lora_b"
"""Leaves of an adapter's parameters: `blocks.0.attn.q.lora_a`, (rank, n_in), and `.lora_b`, (n_out, rank)."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an adapter's patterns mean for one model."""

    linears: dict[str, tuple[int, int]]
    """Layers with an adapter -> (n_out, n_in)."""
    whole: tuple[str, ...]
    """Parameters trained in full."""
    frozen: tuple[str, ...]
    """Parameters that never change."""
    packed: dict[str, tuple[int, int]]
    """Those of them that are held in 4 bits -> (n_out, n_in)."""

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Name -> shape of the adapters' parameters."""
        return {f"{name}.{leaf}": shape for name, (n_out, n_in) in self.linears.items()
                for leaf, shape in ((LORA_A, (rank, n_in)), (LORA_B, (n_out, rank)))}

    def trained(self, model: DecoderConfig, rank: int) -> int:
        """Number of trained parameters."""
        shapes = parameter_shapes(model) | self.adapter_shapes(rank)
        return sum(math.prod(shapes[name]) for name in (*self.whole, *self.adapter_shapes(rank)))


def choose(model: DecoderConfig, adapter: LoraConfig) -> Chosen:
    """The layers that `adapter` names in `model`."""
    shapes = parameter_shapes(model)
    linears = {name: shape for name, shape in linear_layers(model).items() if _any(adapter.targets, name)}
    whole = tuple(name for name in shapes if _in_full(adapter.train, name))
    packed = {name: shape for layer, shape in linear_layers(model).items()
              if adapter.base == "nf4" and (name := f"{layer}.weight") not in whole}
    return Chosen(linears, whole, tuple(name for name in shapes if name not in whole), packed)


def linear_layers(model: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of the blocks, which can have an adapter -> (n_out, n_in)."""
    return {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(model).items()
            if name.startswith("blocks.") and len(shape) == 2}


def trained_count(model: DecoderConfig, adapter: AdapterConfig) -> tuple[int, int]:
    """(trained, all) parameters of the model with its adapters, if it has any."""
    total = sum(map(math.prod, parameter_shapes(model).values()))
    if not isinstance(adapter, LoraConfig):
        return total, total
    chosen = choose(model, adapter)
    return chosen.trained(model, adapter.rank), total + sum(map(math.prod, chosen.adapter_shapes(adapter.rank).values()))


def matches(pattern: str, name: str) -> bool:
    """Does `pattern` name this module, by its whole name or the end of it?"""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _owners(parameter: str) -> list[str]:
    """The modules that a parameter is in, the innermost first."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _in_full(patterns: Sequence[str], parameter: str) -> bool:
    return any(_any(patterns, owner) for owner in _owners(parameter))


# ---- what is refused -----------------------------------------------------------------------------------------------
def adapter_problems(run: RunConfig) -> Iterator[Problem]:
    """Every rule of the adapter that the run breaks."""
    adapter, model = run.adapter, run.model
    if not isinstance(adapter, LoraConfig):
        return
    if isinstance(model, CustomModelConfig):
        yield Problem("adapter", "lora", "is for the built-in decoder; in a model of your own, freeze parameters by "
                      "requires_grad=False in its factory", "adapter=none")
        return
    if isinstance(run.optim, MuonConfig):
        yield Problem("optim", "muon", "orthogonalises each matrix by itself, and of an adapter only the product B A means "
                      "anything", "optim=adamw")
    if not adapter.targets and not adapter.train:
        yield Problem("adapter.targets", "[]", "is empty, and so is adapter.train: nothing would be trained",
                      f"adapter.targets={_DEFAULT}")
    yield from _targets(model, adapter)
    yield from _train(model, adapter)
    uneven = {name: n_in for name, (_, n_in) in choose(model, adapter).packed.items() if n_in % NF4_BLOCK}
    if uneven:
        name, n_in = next(iter(uneven.items()))
        yield Problem("adapter.base", "nf4", f"holds rows in blocks of {NF4_BLOCK} weights, and those of {name} are {n_in} "
                      "long", "adapter.base=full")
    narrowest = min((min(shape) for shape in choose(model, adapter).linears.values()), default=adapter.rank)
    if adapter.rank > narrowest:
        yield Problem("adapter.rank", adapter.rank, f"is more than the {narrowest} rows or columns of the narrowest layer "
                      "chosen: its product with A could be any matrix", f"adapter.rank={max(1, narrowest // 4)}")


_DEFAULT = as_text(LoraConfig().targets)


def _targets(model: DecoderConfig, adapter: LoraConfig) -> Iterator[Problem]:
    linears = linear_layers(model)
    for pattern in adapter.targets:
        if any(matches(pattern, name) for name in linears):
            continue
        end = next((end for end in ("embed", "head", "lm_head", "embed_tokens") if matches(pattern, end)), None)
        if end and model.tie_embeddings:
            rule = ("is one matrix at both ends (model.tie_embeddings=true): an adapter at one would pull them apart. "
                    "Train it in full: adapter.train=[embed]")
        elif end:
            own = "head" if "head" in end else "embed"
            rule = f"has no adapter: those are for the linear layers of the blocks. Train it in full: adapter.train=[{own}]"
        else:
            rule = f"{pattern} matches no layer. The layers there are: {_there(linears)}"
        yield Problem("adapter.targets", as_text(adapter.targets), rule,
                      f"adapter.targets={as_text(_mended(adapter.targets, linears)) if not end else _DEFAULT}")
        return


def _train(model: DecoderConfig, adapter: LoraConfig) -> Iterator[Problem]:
    modules = sorted({owner for name in parameter_shapes(model) for owner in _owners(name)})
    for pattern in adapter.train:
        if any(matches(pattern, name) for name in modules):
            continue
        if pattern in ("head", "lm_head") and model.tie_embeddings:
            rule = "head is tied to embed (model.tie_embeddings=true), and trained with it"
            mended = [other for other in adapter.train if other != pattern]
            mended = mended if "embed" in mended else ["embed", *mended]
        else:
            rule = f"{pattern} matches no module. The modules there are: {_there(modules)}"
            mended = _mended(adapter.train, modules)
        yield Problem("adapter.train", as_text(adapter.train), rule, f"adapter.train={as_text(mended)}")
        return
    chosen = choose(model, adapter)
    both = [name for name in chosen.linears if f"{name}.weight" in chosen.whole]
    if both:
        yield Problem("adapter.train", as_text(adapter.train), f"trains {both[0]} in full, which adapter.targets give an "
                      "adapter; a layer has one or the other",
                      f"adapter.train={as_text([p for p in adapter.train if not _holds(p, both)])}")


def _holds(pattern: str, layers: Sequence[str]) -> bool:
    return any(_in_full([pattern], f"{name}.weight") for name in layers)


def _there(names) -> str:
    """The names with the layers' numbers left out, each once."""
    ends = dict.fromkeys(_without_number(name) for name in names)
    return ", ".join(end for end in ends if end)


def _without_number(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" else name


def _mended(patterns: Sequence[str], names) -> list[str]:
    """The patterns with each wrong one replaced by what was probably meant, or left out; never none."""
    ends = {_without_number(name).rpartition(".")[2]: None for name in names if _without_number(name)}
    mended: dict[str, None] = {}
    for pattern in patterns:
        if any(matches(pattern, name) for name in names):
            mended[pattern] = None
            continue
        meant = pattern.rpartition(".")[2].removesuffix("_proj")
        mended |= dict.fromkeys([meant] if meant in ends else difflib.get_close_matches(meant, ends, 1))
    return list(mended) or (LoraConfig().targets if "q" in ends else ["norm"])
