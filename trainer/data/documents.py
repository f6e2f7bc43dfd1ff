"""From rows to documents: which field is the text, its language, source and id; what HPLT's own fields ask for; filters."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from officina.trainer.data.chat import Chat
from officina.trainer.data.formats import BadRow, Piece, printable, rows
from officina.trainer.data.samples import COLUMNS, Part, read_sample
from officina.trainer.errors import DataError, told_by_place

TEXT_FIELDS, LANGUAGE_FIELDS, ID_FIELDS = ("text", "content"), ("lang", "language"), ("id", "doc_id", "__key__")
"""Fields that are taken where none is named, in the order of preference."""
NO_LANGUAGE = "und"
"""ISO 639's code for a language that is not known."""
PII_MASK = "[PII]"
SHOWN = 100
"""Places of faults that are kept; the rest is only counted."""
HPLT_STEPS = ("hplt-filter", "hplt-robots", "hplt-pii")
"""Steps that follow from fields of HPLT's rows: `filter` is not "keep"; `allowed` is false; spans in `pii` are masked."""
_CODES = {  # ISO 639-1 (and plain 639-3) -> the codes of OpenEuroLLM, HPLT and FLORES: ISO 639-3 _ ISO 15924
    "lav": "lvs_Latn", "sqi": "als_Latn",  # 639-3's names of the two with their dialects
    "bg": "bul_Cyrl", "bs": "bos_Latn", "ca": "cat_Latn", "cs": "ces_Latn", "cy": "cym_Latn", "da": "dan_Latn",
    "de": "deu_Latn", "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn", "et": "est_Latn", "eu": "eus_Latn",
    "fi": "fin_Latn", "fr": "fra_Latn", "ga": "gle_Latn", "gl": "glg_Latn", "hr": "hrv_Latn", "hu": "hun_Latn",
    "is": "isl_Latn", "it": "ita_Latn", "ka": "kat_Geor", "lt": "lit_Latn", "lv": "lvs_Latn", "mk": "mkd_Cyrl",
    "mt": "mlt_Latn", "nb": "nob_Latn", "nl": "nld_Latn", "nn": "nno_Latn", "no": "nor_Latn", "pl": "pol_Latn",
    "pt": "por_Latn", "ro": "ron_Latn", "sk": "slk_Latn", "sl": "slv_Latn", "sq": "als_Latn", "sv": "swe_Latn",
    "tr": "tur_Latn", "uk": "ukr_Cyrl"}
_CODES |= {code.partition("_")[0]: code for code in _CODES.values()}
_TAG = re.compile(r"([a-z]{2,3})(?:[-_]([a-z]{4}))?(?:[-_](?:[a-z]{2}|\d{3}))?", re.ASCII | re.IGNORECASE)
"""Language, script and region."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of the fields of a row; empty = found by name. Without a source field, the source is the input."""

    text: str = ""
    language: str = ""
    source: str = ""
    id: str = ""

    def columns(self) -> list[str]:
        """Every field that is looked at."""
        given = [name for name in (self.text, self.language, self.source, self.id) if name]
        return [*given, *TEXT_FIELDS, *LANGUAGE_FIELDS, *ID_FIELDS, "u", "ts", "crawl_id", "pii", "filter", "allowed"]


@dataclass(slots=True)
class Document:
    """One text, as a filter sees it."""

    text: str
    source: str
    language: str
    """Such as fin_Latn; empty if not known."""
    id: bytes
    """16 bytes, see `document_id`."""
    digest: bytes
    """sha256 of the text as it was read."""
    bytes: int
    """Of the text as it was read."""
    row: dict[str, Any]
    """All fields of its row; none for a text file."""
    piece: Piece
    number: int

    parts: tuple[Part, ...] = ()
    """Of a sample: its answer, or the chosen and the rejected one; none for a text."""

    @property
    def place(self) -> str:
        """File and row, for an error."""
        return f"{printable(self.piece.path)}{self.piece.place(self.number)}"


_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}([_-][A-Za-z0-9]{2,8})*")


@dataclass(slots=True)
class LeftOut:
    """Rows that give no document, and why; and how often a step of HPLT's fields was taken."""

    undecodable: int = 0
    undecodable_files: list[str] = field(default_factory=list)
    """Names of the files, or of rows in them, that are not UTF-8: the first `SHOWN`."""
    empty: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    """Place and reason of each row that cannot be read: the first `SHOWN`."""
    hides_why: bool = False
    """The data is personal or sensitive: a reason may quote it, so that the place alone is told."""
    steps: dict[str, int] = field(default_factory=dict)
    """Step -> documents left out, or changed."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Samples by kind: answers, pairs."""

    def refuse(self, place: str, why: str) -> None:
        """Count a bad row."""
        self.bad += 1
        if self.bad <= SHOWN:
            said = "cannot be read; why is not told of personal or sensitive data" if self.hides_why else why
            self.bad_rows.append(f"{place}: {said}")


def document_id(name: str) -> bytes:
    """16 bytes of a document's name: those it spells in hexadecimal (a UUID, HPLT's ids), else its sha256's first."""
    digits = name.replace("-", "")
    if len(digits) == 32:
        try:
            return bytes.fromhex(digits)
        except ValueError:
            pass
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16]  # JSON and a tar may name what is no Unicode


def read_documents(pieces: Sequence[Piece], fields: Fields, left_out: LeftOut, *, chat: Chat | None = None,
                   all_fields: bool = False, progress: Callable[[int], None] = lambda done_bytes: None) -> Iterator[Document]:
    """All documents of `pieces` in order: a text file is one, a row is one. The rest is counted in `left_out`.

    chat: rows are samples to fine-tune on, written as it says. `progress` gets the bytes of files that were read. Raises
    DataError for files that cannot be read.
    """
    before_bytes = 0
    for piece in pieces:
        for number, row, done_bytes in rows(piece, None if all_fields else fields.columns() + list(COLUMNS) * bool(chat)):
            if row == b"" and piece.format != "text":  # an empty line
                continue
            found = (_document(row, piece, number, fields, left_out.steps) if chat is None
                     else _sample(row, piece, number, fields, chat, left_out.kinds))
            if isinstance(found, Document):
                if left_out.hides_why and not _LANGUAGE_CODE.fullmatch(found.language):
                    found.language = ""  # names of languages are told: a field with other words in it is none
                yield found
            elif isinstance(found, BadRow):
                left_out.refuse(f"{printable(piece.path)}{piece.place(number)}", found.why)
            elif found == "undecodable":
                left_out.undecodable += 1
                if left_out.undecodable <= SHOWN:
                    left_out.undecodable_files.append(f"{piece.source}/{piece.name}{piece.place(number)}")
            elif found == "empty":
                left_out.empty += 1
            progress(before_bytes + done_bytes)
        before_bytes += piece.bytes


def _document(row: Any, piece: Piece, number: int, fields: Fields, steps: dict[str, int]) -> Document | BadRow | str:
    """The document, or why there is none."""
    if isinstance(row, BadRow):
        return row
    values = row if isinstance(row, dict) else {}
    content = row if isinstance(row, bytes) else _first(row, fields.text, TEXT_FIELDS)
    if content is None:
        known = [fields.text] if fields.text else TEXT_FIELDS
        if any(name in row for name in known):  # null
            return "empty"
        names = " or ".join(map(repr, known))
        return BadRow(f"no JSON object with the field {names} (it has {', '.join(map(repr, list(row)[:8])) or 'none'}). "
                      "Name the text's field: --text-field NAME" if piece.format == "json" else
                      f"no text under {names}. Name the text's field: --text-field NAME")
    if not isinstance(content, str | bytes):
        return BadRow(f"field {_name_of(row, fields.text, TEXT_FIELDS)!r} is no text. Name the text's field: --text-field NAME")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        encoded = text.encode()  # JSON can spell half a surrogate pair, which is no Unicode
    except UnicodeError:
        return "undecodable"
    if not text.strip():
        return "empty"
    digest = hashlib.sha256(encoded).digest()
    if "u" in values and ("ts" in values or "crawl_id" in values or "filter" in values):
        masked = _hplt(values, text, steps)
        if not isinstance(masked, str):
            return masked or "left out"
        text = masked
    labels = _labels(values, piece, fields)
    if isinstance(labels, BadRow):
        return labels
    name = _first(values, fields.id, ID_FIELDS)
    if name is None and values:
        name = values.get("u")
    return Document(text, *labels, digest[:16] if name is None else document_id(str(name)), digest, len(encoded), values, piece,
                    number)


def _sample(row: Any, piece: Piece, number: int, fields: Fields, chat: Chat, kinds: dict[str, int]) -> Document | BadRow | str:
    """The sample of a row as a document, or why there is none."""
    if isinstance(row, BadRow):
        return row
    if isinstance(row, bytes) and piece.format == "text":
        return BadRow("expected rows of samples (.jsonl, .csv, .parquet, .arrow); it is a text")
    if isinstance(row, bytes):  # a row that is not UTF-8
        return "undecodable"
    found = read_sample(row, chat)
    if isinstance(found, BadRow):
        return found
    text = "\0".join(part.text for part in found.parts)
    try:
        encoded = text.encode()
    except UnicodeError:
        return "undecodable"
    labels = _labels(row, piece, fields)
    if isinstance(labels, BadRow):
        return labels
    kinds[found.kind] = kinds.get(found.kind, 0) + 1
    digest, name = hashlib.sha256(encoded).digest(), _first(row, fields.id, ID_FIELDS)
    id = digest[:16] if name is None else document_id(str(name))
    return Document(text, *labels, id, digest, len(encoded), row, piece, number, found.parts)


def _labels(row: dict[str, Any], piece: Piece, fields: Fields) -> tuple[str, str] | BadRow:
    """Source and language of a row."""
    source, language = _first(row, fields.source, ()), _language(_first(row, fields.language, LANGUAGE_FIELDS))
    source = piece.source if source is None else str(source)
    if not _is_unicode(source + language):
        name = fields.source if not _is_unicode(source) else _name_of(row, fields.language, LANGUAGE_FIELDS)
        return BadRow(f"field {name!r} is no Unicode: it has half a surrogate pair")
    return source, language


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(row: dict[str, Any], given: str, known: Sequence[str]) -> str | None:
    return next((name for name in ([given] if given else known) if row.get(name) is not None), None)


def _first(row: dict[str, Any], given: str, known: Sequence[str]) -> Any:
    name = _name_of(row, given, known)
    return None if name is None else row[name]


def _language(value: Any) -> str:
    """HPLT lists the likely languages, the likeliest first."""
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return _code(value) if isinstance(value, str) else ""


@lru_cache(maxsize=4096)
def _code(tag: str) -> str:
    """fin_Latn for fi, fi-FI and FIN_latn; a tag as it is where its language is not known."""
    found = _TAG.fullmatch(tag)
    if found is None:
        return tag
    language, script = found[1].lower(), found[2]
    code = _CODES.get(language, "")
    if script is None:
        return code or tag
    language = code[:3] or language
    return f"{language}_{script.title()}" if len(language) == 3 else tag


def _hplt(row: dict[str, Any], text: str, steps: dict[str, int]) -> str | BadRow | None:
    """The text with its personal data masked; None for what its makers or the site's owner want left out."""
    if row.get("filter") not in (None, "", "keep"):
        steps["hplt-filter"] = steps.get("hplt-filter", 0) + 1
        return None
    if row.get("allowed") is False:
        steps["hplt-robots"] = steps.get("hplt-robots", 0) + 1
        return None
    spans = row.get("pii") or []
    if not isinstance(spans, list | tuple) or not all(_is_span(span, len(text)) for span in spans):
        return BadRow("field 'pii' is no list of [first, end] of characters of the text: what is personal cannot be masked")
    if spans:
        steps["hplt-pii"] = steps.get("hplt-pii", 0) + 1
    parts, done = [], 0
    for first, end, *_ in sorted(tuple(span) for span in spans):
        if first >= done or not parts:
            parts += [text[done:first], PII_MASK]
        done = max(done, end)  # spans that overlap are one
    return "".join([*parts, text[done:]])


def _is_span(span: Any, length: int) -> bool:
    return (isinstance(span, list | tuple) and len(span) >= 2 and all(type(place) is int for place in span[:2])
            and 0 <= span[0] < span[1] <= length)


# ---- filters ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Filter:
    """A function of the user: `keep(document) -> bool | str`. False leaves the document out, a text replaces its text."""

    name: str
    """package.module:function"""
    version: str
    """`__version__` of the module or its package, else the beginning of the sha256 of its source."""
    keep: Callable[[Document], bool | str]

    def __call__(self, document: Document) -> bool:
        """Apply it; the document is changed in place. Raises DataError naming filter and place, and no text."""
        try:
            found = self.keep(document)
        except Exception as exc:  # the user's code may raise anything, and its words may quote the data: no traceback has them
            raise DataError(f"{document.place}: filter {self.name} raised {told_by_place(exc)}. Mend it: a filter returns "
                            "True, False or the text to take instead.") from None
        if isinstance(found, str) and document.parts:
            raise DataError(f"{document.place}: filter {self.name} returned a text, which cannot replace a sample's. Mend it: "
                            "for samples, a filter returns True or False.")
        if isinstance(found, str) and not _is_unicode(found):
            raise DataError(f"{document.place}: filter {self.name} returned a text with half a surrogate pair, which is no "
                            "Unicode. Mend it: a text it returns is one that can be written as UTF-8.")
        if isinstance(found, str):
            document.text = found
            return bool(found.strip())
        if not isinstance(found, bool):
            raise DataError(f"{document.place}: filter {self.name} returned a {type(found).__name__}. Mend it: a filter "
                            "returns True, False or the text to take instead.")
        return found


def load_filter(path: str) -> Filter:
    """The filter behind `package.module:function`. Raises DataError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
        keep = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise DataError(f"--filter {path}: cannot be imported ({exc}). Write package.module:function, with the package "
                        "installed or its folder in PYTHONPATH.") from exc
    version = getattr(module, "__version__", "") or getattr(import_module(module_name.split(".")[0]), "__version__", "")
    file = getattr(module, "__file__", None)
    if not version and file:
        version = "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return Filter(path, str(version), keep)
