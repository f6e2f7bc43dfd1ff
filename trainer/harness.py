"""lm-evaluation-harness on a run's model, in this process and on all ranks, offline.

Every rank runs the harness on all requests, so that all take the same way; the model's work is dealt to the ranks and its
results are exchanged. So any engine will do, sharded ones too, and the harness's own distribution is not needed.
"""

import difflib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from tokenizers import Tokenizer

from officina.trainer.batch import IGNORE, Batch
from officina.trainer.config import RunConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.evaluation import Request
from officina.trainer.generate import first_ids, prompt_ids, sample, stop_ids
from officina.trainer.model.cache import KVCache, LayerCache
from officina.trainer.objective import token_scores
from officina.trainer.parallel.engine import Engine
from officina.trainer.ranks import Ranks

MAX_NEW_TOKENS = 256
"""Where a task does not say how much may be generated."""


def run_tasks(engine: Engine, run: RunConfig, ranks: Ranks, run_dir: Path, request: Request) -> dict[str, dict[str, Any]]:
    """Task (or group of tasks) -> its metrics. A collective; raises OfficinaError for a task that is not known or whose data
    is not on this machine."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "DISABLE_MULTIPROC": "1"}  # its workers, forks of a rank, would take the signal to end for one to save
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(request)
    for name in request.tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise OfficinaError(f"tasks={name}: is no task of lm-evaluation-harness"
                                f"{f' or of {request.tasks_dir}' if request.tasks_dir else ''}. " +
                                (f"Did you mean {', '.join(near)}?" if near else "Your own: --tasks-dir DIR with NAME.yaml"))
    for first in (True, False):  # rank 0 prepares the data sets in the cache, the others find them there
        if first == (ranks.rank == 0):
            _load(request.tasks, manager)
        ranks.barrier()
    found = simple_evaluate(
        RunModel(engine, run, ranks, run_dir), tasks=list(request.tasks), task_manager=manager, num_fewshot=request.shots,
        limit=request.limit, log_samples=False, bootstrap_iters=1000, verbosity="ERROR")
    return {} if found is None else {name: {key: value for key, value in metrics.items() if key not in ("alias", "sample_len")}
                                     for name, metrics in (found["results"] | found.get("groups", {})).items()}


def _manager(request: Request) -> TaskManager:
    """The index of tasks; only that of one's own folder where it has all: reading the thousands shipped takes seconds."""
    if request.tasks_dir:
        own = TaskManager(include_path=request.tasks_dir, include_defaults=False)
        if all(own.match_tasks([name]) for name in request.tasks):
            return own
    return TaskManager(include_path=request.tasks_dir or None)


def _load(tasks: Sequence[str], manager: TaskManager) -> None:
    for name in tasks:
        try:
            get_task_dict([name], manager)
        except Exception as exc:  # datasets raises of all kinds what is not there
            raise OfficinaError(
                f"tasks={name}: its data cannot be loaded, and nothing is downloaded here ({type(exc).__name__}: {exc}). Fetch "
                f"it on a connected machine into the same HF_HOME: lm_eval --model dummy --tasks {name} --limit 1") from exc


class RunModel(TemplateLM):
    """The run's model as the harness asks it. It gives itself out as one rank; see above."""

    def __init__(self, engine: Engine, run: RunConfig, ranks: Ranks, run_dir: Path) -> None:
        super().__init__()
        path = run_dir / "tokenizer.json"
        if not path.exists():
            raise OfficinaError(f"{path} does not exist; benchmarks need it. Copy it there: cp DATASET/tokenizer.json {path}")
        self._engine, self._run, self._ranks = engine, run, ranks
        self._tokenizer = Tokenizer.from_file(str(path))
        self._stops = stop_ids(run_dir, self._tokenizer) or [0]
        self._eos = self._stops[0]
        self._first = first_ids(run_dir, self._tokenizer)
        self._longest = run.batch.seq_len

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        return self._first[0] if self._first else self._eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return prompt_ids(string, self._tokenizer, [] if add_special_tokens is False else self._first)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        return self._scored([(context + continuation, len(continuation)) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        sequences, owners = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self._longest, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, windows):
                sequences.append((context + continuation, len(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._scored(sequences), strict=True):
            sums[number] += logprob
        return sums

    def _scored(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Log-probability of the last n tokens of each sequence, and whether each of them is the most likely one."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
        size, world = self._run.batch.micro_rows, self._ranks.world_size
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        mine: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(batches), world):
            here = first + self._ranks.rank
            numbers = batches[here] if here < len(batches) else batches[first]  # with nothing to do, run the same hooks
            scores = self._engine.infer(token_scores, self._batch([sequences[i] for i in numbers])).cpu()
            for i, nats, likely in zip(numbers, *scores, strict=True):
                n = min(sequences[i][1], self._longest)
                length = min(len(sequences[i][0]) - 1, self._longest)
                mine[i] = -float(nats.double().sum()), bool(likely[length - n:length].all())
        everything = self._exchanged(mine)
        return [(everything[i][0], bool(everything[i][1])) for i in range(len(sequences))]

    def _batch(self, sequences: list[tuple[list[int], int]]) -> Batch:
        cut = [(tokens[-self._longest - 1:], n) for tokens, n in sequences]
        T = max(len(tokens) for tokens, _ in cut) - 1
        fields = {"tokens": torch.zeros((len(cut), T), dtype=torch.int64),
                  "labels": torch.full((len(cut), T), IGNORE, dtype=torch.int64)}
        for i, (tokens, n) in enumerate(cut):
            length, n = len(tokens) - 1, min(n, len(tokens) - 1)
            fields["tokens"][i, :length] = torch.tensor(tokens[:-1])
            fields["labels"][i, length - n:length] = torch.tensor(tokens[len(tokens) - n:])
        return Batch(fields, 0).to(self._ranks.device)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        world = self._ranks.world_size
        limit = max((_limit(request.args[1]) for request in requests), default=0)
        if limit >= self._longest:
            raise OfficinaError(
                f"tasks: up to {limit} tokens are generated (max_gen_toks), and batch.seq_len={self._longest} leaves nothing "
                f"for the prompt. Try: batch.seq_len={1 << (2 * limit).bit_length()}, or in a task file of your own "
                f"generation_kwargs: {{max_gen_toks: {max(1, self._longest // 4)}}}")
        for first in range(0, len(requests), world):
            number = min(first + self._ranks.rank, len(requests) - 1)
            context, wishes = requests[number].args
            texts[number] = self._continued(context, wishes)
        everything = self._exchanged(texts)
        return [everything[i] for i in range(len(requests))]

    def _exchanged(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all ranks found, on every rank."""
        return {int(i): found for said in self._ranks.gather_text(json.dumps(mine)) for i, found in json.loads(said).items()}

    def _continued(self, context: str, wishes: dict[str, Any]) -> str:
        """One text a rank; a rank whose text is done goes on with the others until all are."""
        asked = wishes.get("until") or []
        until = [stop for stop in ([asked] if isinstance(asked, str) else asked) if stop]
        limit = _limit(wishes)
        temperature = float(wishes.get("temperature") or 0) if wishes.get("do_sample") else 0.0
        random = torch.Generator().manual_seed(self._run.seed)
        prompt = (self.tok_encode(context) or [self._eos])[-(self._longest - limit):]
        model = self._run.model
        cache = KVCache([LayerCache(window) for window in model.windows])
        fed, new, text, spelled, going = prompt, [], "", "", True
        while sum(self._ranks.sum([going])):
            batch = Batch({"tokens": torch.tensor([fed])}, 0).to(self._ranks.device)
            logits_V = self._engine.infer(lambda module, fields: module(fields["tokens"], cache=cache)[0, -1], batch).cpu()
            token = sample(logits_V, temperature, float(wishes.get("top_p") or 1.0), random)
            fed = [token]
            if not going:
                continue
            if token not in self._stops:
                new.append(token)
                text, spelled = (self._tokenizer.decode(new, skip_special_tokens=skip) for skip in (True, False))
            going = token not in self._stops and len(new) < limit and not any(stop in spelled for stop in until)
        for stop in until:
            text = text.split(stop)[0]
        return text


def _limit(wishes: dict[str, Any]) -> int:
    """Tokens that a request may generate."""
    return int(wishes.get("max_gen_toks") or MAX_NEW_TOKENS)
