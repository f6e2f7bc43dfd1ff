"""An adapter that PEFT trained as a run: `officina convert import FOLDER --base MODEL --to RUN`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig, LoraConfig, RunConfig
from officina.trainer.data import carried
from officina.trainer.environment import describe
from officina.trainer.errors import CheckpointError, OfficinaError
from officina.trainer.hf.base import open_base
from officina.trainer.hf.config_file import family_for
from officina.trainer.hf.files import Stored
from officina.trainer.hf.peft import load_adapter, read_adapter
from officina.trainer.hf.source import read_stored
from officina.trainer.init_from import pinned
from officina.trainer.initial import content_of, hex_sums, keep_base, keep_tokenizer, open_weights, weights_hash
from officina.trainer.keys import word
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import choose
from officina.trainer.run_dir import Start, append_history, new_run_id, save_config
from officina.trainer.state import PARAM, Piece


def import_adapter(folder: Path, run_dir: Path, name: str, *, base: str = "", nf4: bool = False,
                   words: Sequence[str] = ()) -> RunConfig:
    """Make `run_dir`, which is empty or not there, a run whose checkpoint of step 0 is the adapter of `folder`; returns it.

    name: the run's. base: the model that it belongs to, a folder or a run; empty: what adapter_config.json names, if that is
    a folder here. nf4: it was trained beside a base in 4 bits.
    """
    raw, tensors = load_adapter(folder)
    named = str(raw.get("base_model_name_or_path") or "")
    if not base and not (named and Path(named).is_dir()):
        raise OfficinaError(f"{folder} was trained on {named or 'a model that it does not name'}, which is no folder here, and "
                            "nothing is downloaded. Say where it lies: "
                            f"officina convert import {folder} --base FOLDER --to {run_dir}")
    start = pinned(base or named)
    opened = open_base(start)
    adapter, stored = read_adapter(raw, tensors, opened.model, opened.family or family_for(opened.model), folder)
    run = RunConfig(name=name, model=opened.model, init_from=start, adapter=replace(adapter, base="nf4" if nf4 else "full"))
    shapes, frozen = parameter_shapes(run.model), choose(run.model, adapter).frozen
    run_dir.mkdir(parents=True, exist_ok=True)
    about, run_id = describe(), new_run_id()
    with open_weights(opened, shapes, Alone()) as weights:
        sums = content_of(weights, {each: shapes[each] for each in frozen}, Alone())
        keep_base(opened, run_dir, {"name": opened.name, "kind": "folder" if opened.family else "run",
                                    "hash": weights_hash(weights, shapes, Alone()),
                                    "parameters": sum(map(math.prod, shapes.values()))})
    append_history(run_dir, Start(
        run_id=run_id, action="import", words=words, step=0, world_size=1, engine="single",
        commit=about["code"]["officina"]["commit"], origin={"name": Path(folder).resolve().name},
        versions={"officina": about["officina"], "python": about["python"], **about["packages"]},
        carried=carried.record(carried.of_begin(run) | carried.read_file(folder))))
    keep_tokenizer(run_dir)
    saver = Saver(run_dir, Alone(), CheckpointConfig(), run_id)
    saver.prepare(iter(_pieces(stored)))
    outcome = saver.save(0, iter(_pieces(stored)), TrainState(step=0, frozen=hex_sums(sums)))
    if outcome.problem:
        raise CheckpointError(outcome.problem)
    save_config(run, run_dir)  # last: without it the directory is no run
    return run


def words_to_go_on(run: RunConfig, run_dir: Path) -> list[str]:
    """Words of `officina train` for a run that begins with this adapter."""
    adapter, default = run.adapter, LoraConfig()
    given = {key: getattr(adapter, key) for key in ("rank", "alpha", "rslora", "targets", "train", "base")}
    return ["experiment=lora", "model=from_init", word("init_from", run.init_from), word("adapter.init_from", str(run_dir)),
            *(word(f"adapter.{key}", value) for key, value in given.items()
              if value != getattr(default, key) or key in ("rank", "alpha"))]


def _pieces(stored: dict[str, Stored]) -> list[Piece]:
    values = {name: read_stored(each, 0, each.numel) for name, each in stored.items()}
    for name, tensor in values.items():
        if not torch.isfinite(tensor).all():
            raise OfficinaError(f"{stored[name].file}: {name} holds numbers that are not finite. Take another checkpoint of it")
    return [Piece(name, PARAM, stored[name].shape, 0, stored[name].numel, tensor) for name, tensor in values.items()]
