"""`init_from` judged before a rank starts: is there a model, and is it the one that the run describes? Torch-free."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from officina.trainer.checkpoint.verify import list_checkpoints
from officina.trainer.config import DecoderConfig, LoraConfig, NoAdapterConfig, RunConfig
from officina.trainer.errors import ConfigError, OfficinaError, Problem
from officina.trainer.hf.base import Base, open_base
from officina.trainer.hf.family import canonical
from officina.trainer.hf.tokenizers import tokenizer_text
from officina.trainer.keys import Values, as_text, word
from officina.trainer.model.targets import choose
from officina.trainer.resume import changes, ruling
from officina.trainer.run_dir import load_config
from officina.trainer.schema import dump_run

FROM_INIT = "from_init"
"""`model=from_init`: the model is that of the folder or run named by `init_from`."""
_REMEDY = "init_from=FOLDER, which holds config.json and *.safetensors, or init_from=RUN"


def model_values(init_from: str, own: Values) -> tuple[Values, list[Problem]]:
    """Values of the part `model` for `model=from_init`, with `own` over them, and what stands against it."""
    own = {key: value for key, value in own.items() if key != "kind"}
    if not init_from:
        return own, [Problem("model", FROM_INIT, "takes the model of init_from, which names none",
                             f"model={FROM_INIT} {_REMEDY}")]
    try:
        base = _open(init_from)
    except OfficinaError as error:
        return own, _told(init_from, error)
    return dump_run(RunConfig(model=base.model))["model"] | own, []


def pinned_run(run: RunConfig) -> RunConfig:
    """The run with steps in what it begins from."""
    adapter = run.adapter
    if isinstance(adapter, LoraConfig):
        adapter = replace(adapter, init_from=pinned(adapter.init_from))
    return replace(run, init_from=pinned(run.init_from), adapter=adapter)


def pinned(init_from: str) -> str:
    """`init_from` with the step, where it names a run: what that run trains later does not change where this one began."""
    if not init_from or (base := _open(init_from)).family or base.step is not None:
        return init_from
    steps = [info.step for info in list_checkpoints(base.path) if info.status == "complete"]
    return f"{base.path}@{max(steps)}" if steps else init_from


def adapter_init_problems(run: RunConfig) -> Iterator[Problem]:
    """What stands against beginning with the adapter of the run that `adapter.init_from` names."""
    if not isinstance(run.adapter, LoraConfig) or not run.adapter.init_from or not isinstance(run.model, DecoderConfig):
        return
    key, value = "adapter.init_from", run.adapter.init_from
    try:
        base = _open(value)
    except OfficinaError as error:
        rule = str(error).rpartition(". ")[0]
        yield Problem(key, value, rule, "adapter.init_from=RUN, of PEFT's folder: officina convert import FOLDER --to RUN")
        return
    if found := _no_such_step(key, value, base):
        yield from found
        return
    there = NoAdapterConfig() if base.family else load_config(base.path).adapter
    if not isinstance(there, LoraConfig):
        yield Problem(key, value, "has no adapter", f"adapter.init_from= init_from={value}")
        return
    chosen, wanted = choose(run.model, run.adapter), choose(run.model, there)
    differ = {"rank": there.rank != run.adapter.rank, "alpha": there.alpha != run.adapter.alpha,
              "rslora": there.rslora != run.adapter.rslora, "targets": chosen.linears != wanted.linears,
              "train": chosen.whole != wanted.whole}
    for name in (name for name, differs in differ.items() if differs):
        yield Problem(f"adapter.{name}", as_text(getattr(run.adapter, name)), f"is {as_text(getattr(there, name))} in {value}, "
                      "with whose adapter the run begins", word(f"adapter.{name}", getattr(there, name)))


def init_problems(run: RunConfig, *, force: bool = False) -> list[Problem]:
    """What stands against starting the run from the weights it names."""
    if not run.init_from:
        return []
    if not isinstance(run.model, DecoderConfig):
        return [Problem("init_from", run.init_from, "is for the built-in decoder; a custom model loads its own weights in its "
                        "factory", "leave it out, and read the weights in model.factory")]
    try:
        base = _open(run.init_from)
    except OfficinaError as error:
        return _told(run.init_from, error)
    if found := _no_such_step("init_from", run.init_from, base):
        return found
    return _differences(base, run, force) + ([] if force else list(_other_tokenizers(base, run)))


def _other_tokenizers(base: Base, run: RunConfig) -> Iterator[Problem]:
    """Data whose ids mean other tokens than the model learned; tokens that were added to its own are no fault."""
    from tokenizers import Tokenizer

    try:
        of_model = tokenizer_text(base.path)
    except OfficinaError:
        return  # it brought none that could be compared
    for name, source in run.data.sources.items():
        path = Path(source.path) / "tokenizer.json"
        of_data = path.read_text(encoding="utf-8") if path.is_file() else of_model
        if of_data == of_model:
            continue
        there, here = (Tokenizer.from_str(text).get_vocab(with_added_tokens=True) for text in (of_model, of_data))
        other = next((token for token, id_ in there.items() if here.get(token) != id_), None)
        if other is not None:
            told = f"{other!r} is {here.get(other, 'no token')} here and {there[other]} there"
            yield Problem(f"data.sources.{name}", source.path, "was built with another tokenizer than that of "
                          f"{base.path}, which init_from names: {told}",
                          f"officina data build NEW --tokenizer {base.path} ..., or the same command with --force")


def _no_such_step(key: str, value: str, base: Base) -> list[Problem]:
    """RUN@STEP, or RUN, without a checkpoint to begin from."""
    if base.family:
        return []
    there = sorted(info.step for info in list_checkpoints(base.path) if info.status == "complete")
    if base.step in there or (base.step is None and there):
        return []
    what = "no whole checkpoint" if base.step is None else f"no whole checkpoint of step {base.step}"
    known = ", ".join(map(str, there)) or "none"
    return [Problem(key, value, f"{base.path} has {what}; there are: {known}",
                    f"{key}={base.path}@{there[-1]}" if there else f"officina resume {base.path}, which writes one")]


def _open(text: str) -> Base:
    try:
        return open_base(text)
    except OSError as error:  # such as a path that is too long for any
        raise OfficinaError(f"{text[:60]} cannot be opened: {error.strerror}. Name a folder or a run that can be") from error


def _told(init_from: str, error: OfficinaError) -> list[Problem]:
    if isinstance(error, ConfigError):
        return [Problem(f"init_from: {p.key}", p.value, p.rule, p.remedy) for p in error.problems]
    rule, _, remedy = str(error).rpartition(". ")
    return [Problem("init_from", init_from, rule or str(error), remedy[:1].lower() + remedy[1:] if rule else _REMEDY)]


def _differences(base: Base, run: RunConfig, force: bool) -> list[Problem]:
    """Judged by the table of resume: what needs --force there needs it here."""
    there, here = RunConfig(model=canonical(base.model)), RunConfig(model=canonical(run.model))
    refused, found = [], []
    grown = replace(there, model=replace(there.model, vocab_size=max(there.model.vocab_size, here.model.vocab_size)))
    if not any(ruling(change.key)[0] == "refused" for change in changes(grown, here)):
        there = grown  # the same model with more tokens: its new rows begin as the mean of the old ones
    for change in changes(there, here):
        rule, why = ruling(change.key)
        if rule == "refused":
            refused.append(f"{change.key.removeprefix('model.')} {as_text(change.new)} (there {as_text(change.old)})")
        elif rule == "force" and not force:
            found.append(Problem(change.key, as_text(change.new), f"is {as_text(change.old)} in {base.path}, which init_from "
                                 f"names; {why}", f"the same command with --force, or model={FROM_INIT}"))
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        return [Problem("init_from", run.init_from, "is another model than that of the run: " + ", ".join(refused[:4])
                        + more, f"model={FROM_INIT} init_from={run.init_from}")]
    return found


