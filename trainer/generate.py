"""Text from a checkpoint: `officina generate RUN "prompt"`."""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.config import DecoderConfig, RunConfig
from officina.trainer.data.chat import ANSWER_ENDS
from officina.trainer.data.tokenizer import EOS_NAMES
from officina.trainer.errors import OfficinaError
from officina.trainer.hf.base import BASE_DIR
from officina.trainer.initial import plain_weights
from officina.trainer.model.build import build_transformer, check_attention
from officina.trainer.model.transformer import Transformer
from officina.trainer.run_dir import load_config, split_step
from officina.trainer.state import PARAM, Source

EXAMPLES = """examples:
  officina generate runs/demo "def fibonacci(n):"
  officina generate runs/demo "class Queue:" --step 600 --temperature 0
"""


def generate(module: Transformer, tokens: Sequence[int], *, max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, seed: int = 0, stop_id: int | Collection[int] | None = None) -> Iterator[int]:
    """Continue `tokens` one token at a time; the same seed gives the same tokens.

    temperature: 0 takes the most likely token. top_p: draw from the fewest tokens whose probability reaches this.
    stop_id: end before this token, or any of these. Raises OfficinaError for values that make no sense.
    """
    _check(tokens, module.config.vocab_size, max_new_tokens, temperature, top_p, seed)
    stop_ids = () if stop_id is None else (stop_id,) if isinstance(stop_id, int) else tuple(stop_id)
    return _continue(module, tokens, max_new_tokens, temperature, top_p, seed, stop_ids)


def load(run: RunConfig, source: Source, device: torch.device) -> Transformer:
    """The run's model on one device, ready to generate: bf16 on a GPU, fp32 elsewhere."""
    check_attention(run.model, device.type)
    module = build_transformer(run.model).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    module = module.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.copy_(source.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
    return module


def main(argv: Sequence[str]) -> int:
    """`officina generate ...`: writes prompt and continuation to stdout as they come."""
    args = _parser().parse_args(argv)
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 arrive as surrogates
        raise OfficinaError(f"the prompt is not UTF-8 at character {error.start}. "
                            "Give it as UTF-8 text, for example 'def '") from None
    run_dir, step = split_step(args.run)
    if args.step is not None and step not in (None, args.step):
        raise OfficinaError(f"{args.run} --step {args.step} names two steps. Try: officina generate {run_dir} PROMPT "
                            f"--step {args.step}")
    run = load_config(run_dir)
    if not isinstance(run.model, DecoderConfig):
        raise OfficinaError("model.kind=custom: `officina generate` continues text with the built-in decoder only. "
                            "Call your own module: see docs/bring_your_own_model.md")
    path = run_dir / "tokenizer.json"
    if not path.exists():
        raise OfficinaError(f"{path} does not exist; it is copied from the data set when a run on text starts. "
                            f"Copy it there: cp DATASET/tokenizer.json {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its own errors are of no class of their own
        raise OfficinaError(f"{path} is no tokenizer that can be read ({error}). "
                            f"Copy it anew: cp DATASET/tokenizer.json {path}") from error
    use_gpu = run.device != "cpu" and torch.cuda.is_available()
    with open_checkpoint(run_dir, step=step if args.step is None else args.step) as checkpoint:
        for fault in checkpoint.passed_over:
            print(f"officina generate: {fault}", file=sys.stderr)
        with plain_weights(run_dir, checkpoint, Alone()) as source:
            module = load(run, source, torch.device("cuda" if use_gpu else "cpu"))
    stops = stop_ids(run_dir, tokenizer)
    tokens = prompt_ids(args.prompt, tokenizer, first_ids(run_dir, tokenizer)) or [stops[0] if stops else 0]
    new = generate(module, tokens, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                   top_p=args.top_p, seed=args.seed, stop_id=stops)
    said = [args.prompt]
    sys.stdout.write(args.prompt)
    for text in stream_text(tokenizer.decode, tokens, new):
        said.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if args.keep:
        (run_dir / "samples.txt").write_text("".join(said) + "\n", encoding="utf-8")
    return 0


def stream_text(decode: Callable[[list[int]], str], prompt: Sequence[int], new: Iterator[int]) -> Iterator[str]:
    """The text that each new token adds; a character of several tokens is held back until it is whole."""
    tokens = list(prompt)
    written = decode(tokens)
    for token in new:
        tokens.append(token)
        text = decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(written):]
            written = text


@torch.no_grad()
def _continue(module: Transformer, tokens: Sequence[int], max_new_tokens: int, temperature: float, top_p: float,
              seed: int, stop_ids: tuple[int, ...]) -> Iterator[int]:
    device = module.embed.weight.device
    random = torch.Generator().manual_seed(seed)  # on the CPU: the same draws whatever the device
    cache = module.new_cache()
    fed = torch.tensor([list(tokens)], device=device)
    for _ in range(max_new_tokens):
        logits_V = module(fed, cache=cache)[0, -1]
        token = sample(logits_V.cpu(), temperature, top_p, random)
        if token in stop_ids:
            return
        yield token
        fed = torch.tensor([[token]], device=device)


def sample(logits_V: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """One token from logits (V,) on the CPU; temperature 0 takes the most likely."""
    if temperature == 0:
        return int(logits_V.argmax())
    temperature = max(temperature, 1e-290)  # quotients would overflow; far above it the most likely token has all
    sorted_V, order_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept_V = sorted_V.masked_fill(before_V >= top_p, 0.0)  # the first is always kept: nothing is before it
    return int(order_V[torch.multinomial(kept_V, 1, generator=random)])


def _check(tokens: Sequence[int], vocab_size: int, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if not len(tokens):
        raise OfficinaError("the prompt has no tokens; give at least one, for example 'def '")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise OfficinaError(f"the prompt holds token {max(tokens)}, but model.vocab_size={vocab_size}. "
                            "Use the tokenizer that the run was trained with")
    if max_new_tokens < 1:
        raise OfficinaError(f"--max-new-tokens {max_new_tokens} must be at least 1, for example 200")
    if not 0 <= temperature < float("inf"):
        raise OfficinaError(f"--temperature {temperature} must be 0 (most likely token) or more, for example 0.8")
    if not 0 < top_p <= 1:
        raise OfficinaError(f"--top-p {top_p} must be above 0 and at most 1, for example 0.95")
    if not -2**63 <= seed < 2**63:
        raise OfficinaError(f"--seed {seed} must be a number of 64 bits, for example 0")


def first_ids(run_dir: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text, if the model knows them: one that came from Hugging Face's form, or was
    trained on samples. Texts are trained on without them."""
    if not any((run_dir / name).exists() for name in (f"{BASE_DIR}/config.json", ANSWER_ENDS)):
        return []
    found = tokenizer.encode("a", add_special_tokens=True)
    return [id_ for id_, _ in takewhile(all, zip(found.ids, found.special_tokens_mask, strict=True))]


def prompt_ids(text: str, tokenizer: Tokenizer, first: Sequence[int]) -> list[int]:
    """The tokens of a prompt behind `first`; a text that begins with a special token, as one of a chat template, is whole."""
    ids, special = tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.get_added_tokens_decoder()
    begun = bool(ids) and ids[0] in special and special[ids[0]].special
    return ids if begun else [*first, *ids]


def stop_ids(run_dir: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: those of the model the run started from, else the one that ends documents of its data;
    and those that end the answers it was trained on."""
    ends = answer_ends(run_dir, tokenizer)
    for name in ("generation_config.json", "config.json"):
        path = run_dir / BASE_DIR / name
        if path.exists() and (found := as_list(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))):
            return list(dict.fromkeys([*found, *ends]))
    ids = (tokenizer.token_to_id(name) for name in EOS_NAMES)
    return list(dict.fromkeys([*[found for found in ids if found is not None][:1], *ends]))


def answer_ends(run_dir: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end the answers of the samples that the run was trained on; none for other data."""
    path = run_dir / ANSWER_ENDS
    names = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [found for name in names if (found := tokenizer.token_to_id(name)) is not None]


def as_list(ids: int | list[int] | None) -> list[int]:
    """`eos_token_id` as files have it."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="officina generate", description="Continue a prompt with the model of a run.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory, or RUN@STEP")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest that is whole")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X",
                        help="0 takes the most likely token; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P",
                        help="draw from the fewest tokens that reach this probability; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="also write the text to RUN/samples.txt, for the report")
    return parser
