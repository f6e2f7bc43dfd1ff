"""Samples to fine-tune the demo's model on, from the Python standard library: docstring to signature, function to docstring."""

import ast
import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from officina.trainer.data.sources import standard_library

SIGNATURE = "# Write the signature.\n# {}\n"
DOCSTRING = "# Write the docstring.\n{}\n"
_LONGEST = 480
"""Characters of a sample: what fits a row of the demo, whose tokens hold about three."""


def write_samples(path: Path) -> int:
    """Write {"prompt", "completion", "source"} rows as JSON lines, shuffled, the same for the same Python; returns how many."""
    rows = [row for name, file in standard_library()[0][0].files for row in samples_of(file.read_bytes(), name)]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return len(rows)


def samples_of(source: bytes, name: str) -> Iterator[dict[str, str]]:
    """The samples of one file; none of one that this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.decode("utf-8", "replace").splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (summary := _summary(node)):
            continue
        signature = f"def {node.name}({ast.unparse(node.args)}):\n"
        body = _body(node, lines)
        pairs = [(SIGNATURE.format(summary), signature)]
        pairs += [(DOCSTRING.format(signature + body), f'    """{summary}"""\n')] if body else []
        for prompt, completion in pairs:
            if len(prompt) + len(completion) <= _LONGEST:
                yield {"prompt": prompt, "completion": completion, "source": name}


def _summary(node: ast.FunctionDef) -> str:
    """First sentence of the docstring where it says something in one line."""
    first = re.split(r"\n\s*\n|(?<=\.)\s", (ast.get_docstring(node) or "").strip(), maxsplit=1)[0]
    return " ".join(first.split()) if 12 <= len(first) <= 120 and '"""' not in first else ""


def _body(node: ast.FunctionDef, lines: Sequence[str]) -> str:
    """The function's code after its docstring, indented by four; empty where that is all there is."""
    if len(node.body) < 2:
        return ""
    code = lines[node.body[1].lineno - 1:node.end_lineno]
    indent = node.body[1].col_offset
    return "\n".join("    " + line[indent:] for line in code)
