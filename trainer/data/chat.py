"""Conversations as text by the tokenizer's own chat template, and which characters of it are the model's answers.

A template is Jinja, run in a sandbox as transformers does. Where it marks what the model says by {% generation %}, that is what
is trained. Where it does not, an answer is what comes to the text by its message: the conversation up to the answer, with the
prompt for it, must begin the conversation with it, and that must begin the whole. Then the answer is exactly the rest, up to
the last special token in it, which ends the turn. A template for which this does not hold is refused, never guessed at.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from officina.trainer.data.tokenizer import EOS_NAMES
from officina.trainer.errors import DataError

CHAT_TEMPLATE = "chat_template.jinja"
"""Its file in a tokenizer's folder, a data set and a run."""
ANSWER_ENDS = "answer_ends.txt"
"""In a run on samples: the tokens that end their answers, one a line."""
PLAIN = """\
{%- for message in messages %}{{ '### ' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"""
"""For tokenizers without a template: needs no token but the one that ends a document."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text has them

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """How conversations are written for one model."""

    template: str
    """Empty: the tokenizer has none."""
    names: tuple[tuple[str, str], ...]
    """bos_token and so on, and their text, as the template gets them."""
    special: tuple[str, ...]
    """Every special token's text."""
    bos: str
    """What the tokenizer puts before a text; empty if nothing."""
    eos: str
    last: bool = False
    """Train on the last answer of a conversation only."""
    date: str = ""
    """What `strftime_now` gives, 2026-11-25; empty: a template cannot ask for the date."""

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans within {% generation %}; prompt: end with what asks for an answer.

        Raises ValueError with the template's own words where it refuses the conversation.
        """
        if not self.template:
            raise ValueError("the tokenizer has no chat template")
        return _render(_compiled(self.template, self.date), {
            "messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt} | dict(self.names))

    def answers(self, messages: Sequence[Message], tools: Any = None, first: int = 0) -> tuple[str, list[Span]]:
        """The text and the spans of it to be trained on: of the answers from message `first` on, or of the last one.

        Raises ValueError where the spans cannot be told exactly.
        """
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]  # nothing is learnt from what follows the last answer
        text, marked = self.render(messages, tools)
        wanted = [i for i, each in enumerate(messages) if each["role"] == "assistant" and i >= first]
        wanted = wanted[-1:] if self.last else wanted
        if re.search(r"{%-?\s*generation\s*-?%}", self.template):
            total = sum(each["role"] == "assistant" for each in messages)
            if len(marked) != total:
                raise ValueError(f"the template marks {len(marked)} answers by {{% generation %}}, but there are {total}")
            return text, marked[total - len(wanted):]
        spans = [self._answer(messages, tools, i, text) for i in wanted]
        return text, spans

    def _answer(self, messages: Sequence[Message], tools: Any, i: int, text: str) -> Span:
        before, _ = self.render(messages[:i], tools, prompt=True)
        upto, _ = self.render(messages[:i + 1], tools)
        remedy = "Name a template that marks answers by {% generation %}: --chat-template FILE"
        if not upto.startswith(before):
            raise ValueError(f"which part of message {i + 1} is the answer cannot be told: the template does not write it "
                             f"after its own prompt for an answer. {remedy}")
        if not text.startswith(upto):
            raise ValueError(f"the template writes answer {i + 1} otherwise when messages follow it. "
                             + (remedy if self.last else f"Train on the last one: --train-on last. Or: {remedy}"))
        ends = [m.end() for m in _pattern(self.special).finditer(upto, len(before))] if self.special else []
        return len(before), max(ends) if ends else len(upto.rstrip())

    def check(self) -> str:
        """The token that ends an answer. Raises DataError for a template that would teach the model something wrong."""
        if not self.template:
            return self.eos
        try:
            text, spans = self.answers([{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}])
        except ValueError as exc:
            raise DataError(f"the chat template cannot be used: {exc}") from exc
        a, b = spans[0]
        ends = [m.group() for m in _pattern(self.special).finditer(text, a, b)] if self.special else []
        if not ends or not text[a:b].rstrip().endswith(ends[-1]):
            raise DataError(f"the chat template ends an answer with {text[a:b][-12:]!r}, which is no special token of the "
                            "tokenizer: a model trained so never learns to stop. Let it write eos_token after an answer, "
                            "within {% generation %} if it marks answers: --chat-template FILE")
        if self.bos and text.startswith(self.bos * 2):
            raise DataError(f"the chat template begins with {self.bos} twice. Mend it: --chat-template FILE")
        return ends[-1]


@lru_cache(maxsize=8)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))


def special_token_in(text: str, special: tuple[str, ...]) -> str:
    """A special token that `text` spells; empty if none."""
    found = _pattern(special).search(text) if special else None
    return found.group() if found else ""


# ---- Jinja -----------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=8)
def _compiled(template: str, date: str) -> Callable[..., str]:
    """The template, ready to be rendered. Raises DataError if it is no Jinja."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise DataError("chat templates need the package jinja2, which is not installed. "
                        "Try: pip install 'officina[data]'") from exc

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the model says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return _OPEN + caller() + _CLOSE

    def refuse(words: str) -> None:
        raise TemplateError(words)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    if date:
        from datetime import date as Date

        environment.globals["strftime_now"] = Date.fromisoformat(date).strftime
    try:
        return environment.from_string(template).render
    except TemplateError as exc:
        raise DataError(f"the chat template is no Jinja (line {getattr(exc, 'lineno', '?')}: {exc}). "
                        "Name another: --chat-template FILE") from exc


def _render(render: Callable[..., str], values: dict[str, Any]) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError

    try:
        marked = render(**values)
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as exc:
        if "strftime_now" in str(exc):
            raise ValueError("the template asks for today's date, which would differ from build to build. "
                             "Give it one: --chat-date 2026-11-25") from exc
        raise ValueError(f"the chat template refuses it: {exc}") from exc
    pieces, spans, length = [], [], 0
    for i, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", marked)):
        if i % 2:
            spans.append((length, length + len(part)))
        pieces.append(part)
        length += len(part)
    return "".join(pieces), spans


# ---- from a tokenizer's folder ---------------------------------------------------------------------------------------
def load_chat(folder: Path | None, tokenizer: str, *, template: str = "", eos: str = "", last: bool = False,
              date: str = "") -> Chat:
    """The chat of a tokenizer (the text of its tokenizer.json) with the other files of its folder.

    template: a file, or `plain`; empty: the tokenizer's own. Raises DataError if a file cannot be read.
    """
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(tokenizer)
    special = tuple(t.content for t in loaded.get_added_tokens_decoder().values() if t.special)
    config: dict[str, Any] = {}
    if folder is not None and (path := folder / "tokenizer_config.json").exists():
        try:
            config = json.loads(path.read_bytes())
        except ValueError as exc:
            raise DataError(f"{path}: is no JSON ({exc}). Restore it from the model's source.") from exc
    names, older = {}, _older_names(folder)
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name, older.get(name))
        if isinstance(value := value.get("content") if isinstance(value, dict) else value, str):
            names[name] = value
    vocabulary = loaded.get_vocab(with_added_tokens=True)
    ends = eos or names.get("eos_token") or next((name for name in EOS_NAMES if name in vocabulary), "")
    if not ends or ends not in vocabulary:
        raise DataError(f"the tokenizer has no token {ends or 'to end a text with'}. Name the one it has: --eos TOKEN")
    names["eos_token"] = ends
    before = loaded.encode("a", add_special_tokens=True).tokens
    bos = before[0] if len(before) and before[0] in special else ""
    return Chat(template=_template(folder, template, config), names=tuple(names.items()), special=special, bos=bos, eos=ends,
                last=last, date=date)


def _older_names(folder: Path | None) -> dict[str, Any]:
    """special_tokens_map.json, which tokenizers have that were saved before tokenizer_config.json said it all."""
    path = folder / "special_tokens_map.json" if folder else None
    if path is None or not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as exc:
        raise DataError(f"{path}: is no JSON ({exc}). Restore it from the model's source.") from exc


def _template(folder: Path | None, asked: str, config: dict[str, Any]) -> str:
    if asked == "plain":
        return PLAIN
    if asked:
        try:
            return Path(asked).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as exc:
            raise DataError(f"--chat-template {asked}: cannot be read ({exc}). Name a file of Jinja, or: --chat-template "
                            "plain") from exc
    if folder is not None and (path := folder / CHAT_TEMPLATE).exists():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):  # several under names
        found = next((each["template"] for each in found if each.get("name") == "default"), "")
    return found
