"""Rows to fine-tune on: which shape a row has, and what of it is prompt and what answer.

    text                      {"text"}                                          all of it is trained on
    prompt and completion     {"prompt", "completion"}, texts or messages
    messages                  {"messages": [{"role", "content"}], "tools"}
    ShareGPT                  {"conversations": [{"from", "value"}], "system", "tools"}
    alpaca                    {"instruction", "input", "output", "system", "history"}
    preference                {"prompt", "chosen", "rejected"}, texts or messages; without prompt: what both begin with
"""

import json
from dataclasses import dataclass
from typing import Any

from officina.trainer.data.chat import Chat, Message, Span, special_token_in
from officina.trainer.data.formats import BadRow

COLUMNS = ("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "history",
           "tools", "chosen", "rejected")
ANSWERS, PAIRS = "answers", "pairs"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
          "model": "assistant", "system": "system", "function_call": "assistant", "observation": "tool", "tool": "tool"}
_EXPECTED = ("expected messages (a list of role and content), conversations (a list of from and value), instruction and "
             "output, prompt and completion, chosen and rejected, or text")


@dataclass(frozen=True, slots=True)
class Part:
    """A text and what of it is trained on."""

    text: str
    spans: list[Span]
    """Characters [a, b)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, as it goes into the shards."""

    kind: str
    """answers: one part; pairs: the chosen and then the rejected one."""
    parts: tuple[Part, ...]


class _Wrong(ValueError):
    """Why a row is no sample."""


def read_sample(row: dict[str, Any], chat: Chat) -> Sample | BadRow:
    """The sample of a row, or what was expected of it."""
    try:
        return _read({name: value for name, value in row.items() if value is not None}, chat)
    except ValueError as exc:
        return BadRow(str(exc))


def _read(row: dict[str, Any], chat: Chat) -> Sample:
    if "chosen" in row or "rejected" in row:
        return Sample(PAIRS, _pair(row, chat))
    if "messages" in row:
        return _chat(_messages(row["messages"], "messages", chat), row, chat)
    if "conversations" in row:
        return _chat(_with_system(row, _messages(row["conversations"], "conversations", chat), chat), row, chat)
    if "instruction" in row:
        return _chat(_alpaca(row, chat), row, chat)
    if "completion" in row:
        prompt, completion = row.get("prompt", ""), row["completion"]
        if isinstance(completion, list):
            before = _messages(prompt, "prompt", chat) if prompt else []
            return _chat(before + _messages(completion, "completion", chat), row, chat, len(before))
        return Sample(ANSWERS, (_plain(_text(prompt, "prompt"), _text(completion, "completion"), chat, "completion"),))
    if "text" in row:
        return Sample(ANSWERS, (_plain("", _text(row["text"], "text"), chat, "text"),))
    raise _Wrong(f"{_EXPECTED}; it has {', '.join(map(repr, list(row)[:8])) or 'no field'}")


# ---- texts -----------------------------------------------------------------------------------------------------------
def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"expected a text as {name!r}; it is a {type(value).__name__}")
    return value


def _plain(prompt: str, answer: str, chat: Chat, name: str) -> Part:
    """Prompt and answer as they stand, between the tokens that begin and end a text, each of them once."""
    if not answer.strip():
        raise _Wrong(f"expected a {name} to train on; it is empty")
    before = prompt if not chat.bos or (prompt or answer).startswith(chat.bos) else chat.bos + prompt
    after = answer if answer.endswith(chat.eos) else answer + chat.eos
    return Part(before + after, [(len(before), len(before) + len(after))])


# ---- conversations ---------------------------------------------------------------------------------------------------
def _messages(value: Any, name: str, chat: Chat) -> list[Message]:
    if isinstance(value, str):  # a prompt that is a text, before messages
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"a {type(value).__name__}"
        raise _Wrong(f"expected a list of messages as {name!r}; it is {kind}")
    found = []
    for number, each in enumerate(value, 1):
        where = f"message {number} of {name!r}"
        if not isinstance(each, dict):
            raise _Wrong(f"expected an object as {where}; it is a {type(each).__name__}")
        message = {key: part for key, part in each.items() if part is not None}
        if "from" in message and "role" not in message:
            message = {"role": message["from"], "content": message.get("value", "")}
        role = message.get("role")
        if not isinstance(role, str) or (role not in _ROLES and role != "developer"):
            raise _Wrong(f"expected a role of {where}: user, assistant, system or tool; it has {str(role)[:40]!r}")
        message["role"] = _ROLES.get(role, role)
        message.setdefault("content", "")
        if not isinstance(message["content"], str):
            raise _Wrong(f"expected a text as content of {where}; it is a {type(message['content']).__name__}")
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise _Wrong(f"expected an answer in {where}; it is empty")
        _no_special_token(message, where, chat)
        found.append(message)
    return found


def _no_special_token(value: Any, where: str, chat: Chat) -> None:
    """In any text within: the content, what was thought before it, arguments of a call, descriptions of tools."""
    if isinstance(value, dict | list):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _no_special_token(each, where, chat)
    elif isinstance(value, str) and (token := special_token_in(value, chat.special)):
        raise _Wrong(f"{where} spells the special token {token}, which would end or begin a turn; take it out of the text")


def _with_system(row: dict[str, Any], messages: list[Message], chat: Chat) -> list[Message]:
    if row.get("system") and messages[0]["role"] != "system":
        said = {"role": "system", "content": _text(row["system"], "system")}
        return [*_messages([said], "system", chat), *messages]
    return messages


def _alpaca(row: dict[str, Any], chat: Chat) -> list[Message]:
    turns = row.get("history") or []
    if not isinstance(turns, list) or any(not isinstance(t, list | tuple) or len(t) != 2 for t in turns):
        raise _Wrong("expected a list of [question, answer] as 'history'")
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + _text(row["input"], "input")
    if "output" not in row:
        raise _Wrong(f"expected 'output' beside 'instruction'; it has {', '.join(map(repr, list(row)[:8]))}")
    turns = [*turns, [question, _text(row["output"], "output")]]
    return _with_system(row, _messages([message for asked, said in turns for message in (
        {"role": "user", "content": asked}, {"role": "assistant", "content": said})], "instruction and output", chat), chat)


def _tools(row: dict[str, Any]) -> Any:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            return json.loads(tools)
        except ValueError:
            raise _Wrong("expected JSON as 'tools'; it is none") from None
    return tools or None


def _chat(messages: list[Message], row: dict[str, Any], chat: Chat, first: int = 0) -> Sample:
    return Sample(ANSWERS, (_rendered(messages, row, chat, first),))


def _rendered(messages: list[Message], row: dict[str, Any], chat: Chat, first: int) -> Part:
    if not any(each["role"] == "assistant" for each in messages[first:]):
        raise _Wrong("expected an answer, a message of role assistant; there is none to train on")
    tools = _tools(row)
    _no_special_token(tools, "a tool", chat)
    text, spans = chat.answers(messages, tools, first)
    return Part(text, spans)


# ---- preferences -----------------------------------------------------------------------------------------------------
def _pair(row: dict[str, Any], chat: Chat) -> tuple[Part, Part]:
    if not ("chosen" in row and "rejected" in row):
        raise _Wrong(f"expected 'chosen' and 'rejected'; it has {', '.join(map(repr, list(row)[:8]))}")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise _Wrong("expected chosen and rejected of one kind, two texts or two lists of messages")
    if chosen == rejected:
        raise _Wrong("expected chosen and rejected to differ; they are the same")
    if not isinstance(chosen, list):
        chosen, rejected = _text(chosen, "chosen"), _text(rejected, "rejected")
        if prompt is None:  # both begin with it
            shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
                          min(len(chosen), len(rejected)))
            shared -= chosen[:shared].endswith(" ")
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = _text(prompt, "prompt")
        return _plain(prompt, chosen, chat, "chosen"), _plain(prompt, rejected, chat, "rejected")
    chosen, rejected = _messages(chosen, "chosen", chat), _messages(rejected, "rejected", chat)
    before = _messages(prompt, "prompt", chat) if prompt else []
    if not before or chosen[:len(before)] == before == rejected[:len(before)]:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
                      min(len(chosen), len(rejected)))
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return tuple(_rendered(before + answer, row, chat, len(before)) for answer in (chosen, rejected))  # type: ignore[return-value]
