"""Fields are found, HPLT's own are heeded, languages get one code, filters change and drop, and nothing quotes a text."""

import hashlib
import io
import json
import sys
import tarfile
import traceback
from pathlib import Path

import pytest

from officina.trainer.data.chat import Chat
from officina.trainer.data.documents import Document, Fields, LeftOut, document_id, load_filter, read_documents
from officina.trainer.data.formats import pieces_of
from officina.trainer.errors import DataError

HPLT = {"u": "https://a.example/1", "ts": "2024-01-01", "lang": ["fin_Latn", "swe_Latn"], "filter": "keep", "allowed": True,
        "id": "0123456789abcdef0123456789abcdef"}


def read(tmp_path: Path, lines: list[object], fields: Fields | None = None) -> tuple[list[Document], LeftOut]:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return documents_of(path, fields)


def documents_of(path: Path, fields: Fields | None = None, chat: Chat | None = None) -> tuple[list[Document], LeftOut]:
    left_out = LeftOut()
    return list(read_documents(pieces_of("in", path.name, path, 1 << 30), fields or Fields(), left_out, chat=chat)), left_out


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_fields_are_found_by_name_or_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "content": "b", "lang": "fi", "id": 7}, {"content": "b", "language": "deu_Latn"},
            {"body": "c", "text": None, "content": "d", "tongue": "mt", "from": "wiki", "key": "k", "lang": "fi"}]
    found, _ = read(tmp_path, rows)
    assert [(d.text, d.language, d.source) for d in found] == [
        ("a", "fin_Latn", "in"), ("b", "deu_Latn", "in"), ("d", "fin_Latn", "in")]
    assert found[0].id == document_id("7") and found[1].id == hashlib.sha256(b"b").digest()[:16]
    named = Fields(text="body", language="tongue", source="from", id="key")
    [found], left_out = read(tmp_path, rows, named)
    assert (found.text, found.language, found.source, found.id) == ("c", "mlt_Latn", "wiki", document_id("k"))
    assert left_out.bad == 2 and "no JSON object with the field 'body' (it has 'text', 'content', 'lang', 'id')" in (
        left_out.bad_rows[0])


def test_ids_that_are_hexadecimal_are_kept() -> None:
    assert document_id("0123456789abcdef0123456789ABCDEF").hex() == "0123456789abcdef0123456789abcdef"
    assert document_id("01234567-89ab-cdef-0123-456789abcdef").hex() == "0123456789abcdef0123456789abcdef"
    assert document_id("x" * 32) == hashlib.sha256(b"x" * 32).digest()[:16]


def test_null_is_an_empty_text_and_a_missing_field_a_bad_row(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": ""}, {"text": "a", "body": None}, {"text": None, "content": "b"}]
    for found, left_out in (read(tmp_path, rows), documents_of(parquet(tmp_path / "x.parquet", [
            {"text": None, "content": None} | row for row in rows]))):
        assert [d.text for d in found] == ["a", "b"] and (left_out.empty, left_out.bad) == (2, 0)
    assert read(tmp_path, rows, Fields(text="body"))[1].empty == 1
    for _, left_out in (read(tmp_path, [{"body": "a"}]), documents_of(parquet(tmp_path / "x.parquet", [{"body": "a"}]))):
        assert left_out.bad == 1 and "Name the text's field: --text-field NAME" in left_out.bad_rows[0]


# ---- what is no Unicode ----------------------------------------------------------------------------------------------
def test_ids_that_are_no_unicode_stay_distinct(tmp_path: Path) -> None:
    names = [{"id": "\ud83d"}, {"id": "\ud83e"}, {"u": "\udc00", "ts": "1"}, {"id": "\ud83d\ude00"}]
    found, left_out = read(tmp_path, [{"text": str(i)} | name for i, name in enumerate(names)])
    assert len({d.id for d in found}) == 4 and left_out == LeftOut()
    assert found[3].id == hashlib.sha256("\U0001f600".encode()).digest()[:16]
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as file:
        for name in ("caf\xe9.txt", "caf\xe8.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"text"))
    assert len({d.id for d in documents_of(tmp_path / "x.tar")[0]}) == 2


@pytest.mark.parametrize(("row", "name"), [({"lang": "fi\ud83d"}, "lang"), ({"tongue": ["\udc00"], "lang": "fi"}, "tongue"),
                                           ({"from": "\ud83d"}, "from")])
def test_a_source_or_language_that_is_no_unicode_is_a_bad_row(tmp_path: Path, row: dict, name: str) -> None:
    fields = Fields(source="from", language="tongue" if name == "tongue" else "")
    chat = Chat(template="", names=(), special=(), bos="", eos="</s>")
    assert len(read(tmp_path, [{"text": "fine", "lang": "fi", "from": "\U0001f600"}], fields)[0]) == 1
    for found, left_out in (read(tmp_path, [row | {"text": "fine"}], fields),
                            documents_of(tmp_path / "x.jsonl", fields, chat)):
        assert not found and not left_out.kinds
        assert left_out.bad_rows == [f"{tmp_path}/x.jsonl line 1: field '{name}' is no Unicode: it has half a surrogate pair"]


# ---- languages -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "code"), [
    ("fi", "fin_Latn"), ("FI", "fin_Latn"), ("fin", "fin_Latn"), ("fin_latn", "fin_Latn"), ("FIN-LATN", "fin_Latn"),
    ("en-US", "eng_Latn"), ("pt_BR", "por_Latn"), ("es-419", "spa_Latn"), ("uk-Cyrl-UA", "ukr_Cyrl"), ("mk-Latn", "mkd_Latn"),
    ("lv", "lvs_Latn"), ("lav", "lvs_Latn"), ("lvs_Latn", "lvs_Latn"), ("lav_Latn", "lvs_Latn"), ("sq", "als_Latn"),
    ("sqi_Latn", "als_Latn"), ("et", "est_Latn"), ("ekk_Latn", "ekk_Latn"), ("srp_cyrl", "srp_Cyrl"), ("sr", "sr"),
    ("sr-Latn", "sr-Latn"), ("zh-TW", "zh-TW"), ("und", "und"), ("Finnish", "Finnish"), ("fra_latn_fran", "fra_latn_fran"),
    ("", ""), (["swe_Latn", "fin_Latn"], "swe_Latn"), ([], ""), (3, "")], ids=str)
def test_languages_get_one_code(tmp_path: Path, given: object, code: str) -> None:
    [found], _ = read(tmp_path, [{"text": "a", "lang": given}])
    assert found.language == code


CALL = "Call Ada Lovelace on 555-1234."


def test_fields_of_hplt(tmp_path: Path) -> None:
    """What its makers filtered or the site forbids is left out; personal data is masked, last span first."""
    found, left_out = read(tmp_path, [
        HPLT | {"text": CALL, "pii": [[5, 17], [21, 29]]}, HPLT | {"text": "b", "filter": "adult_ut1"},
        HPLT | {"text": "c", "allowed": False}, {k: v for k, v in HPLT.items() if k != "id"} | {"text": "d"},
        {"text": "not of HPLT", "filter": "coffee", "allowed": False, "pii": [[0, 3]]}])
    assert [d.text for d in found] == ["Call [PII] on [PII].", "d", "not of HPLT"]
    assert left_out.steps == {"hplt-pii": 1, "hplt-filter": 1, "hplt-robots": 1}
    assert found[0].language == "fin_Latn" and found[0].id.hex() == HPLT["id"]
    assert found[0].digest == hashlib.sha256(CALL.encode()).digest() and found[1].id == document_id(HPLT["u"])


@pytest.mark.parametrize(("spans", "text"), [
    ([[0, 30], [5, 8]], "[PII]"), ([[5, 17], [10, 20]], "Call [PII] 555-1234."),
    ([[21, 29, "phone"]], "Call Ada Lovelace on [PII]."), ([[0, 4], [4, 5]], "[PII][PII]Ada Lovelace on 555-1234."),
    (None, CALL), ([], CALL)])
def test_personal_data_is_masked_whole(tmp_path: Path, spans: list, text: str) -> None:
    found, _ = read(tmp_path, [HPLT | {"text": CALL, "pii": spans}])
    assert [d.text for d in found] == [text]


@pytest.mark.parametrize("pii", [
    {"email": [[5, 17]]}, [["Ada", "x"]], [[5.0, 17.0]], [[5, 3]], [[-9, 3]], [[5, 400]], [5, 17], "5-17"], ids=str)
def test_personal_data_that_cannot_be_masked_leaves_the_row_out(tmp_path: Path, pii: object) -> None:
    found, left_out = read(tmp_path, [HPLT | {"text": CALL, "pii": pii}])
    assert not found and left_out.bad == 1 and "field 'pii'" in left_out.bad_rows[0] and "Ada" not in left_out.bad_rows[0]


@pytest.mark.parametrize("key", ["ts", "crawl_id", "filter"])
def test_a_row_of_hplt_is_the_same_from_parquet(tmp_path: Path, key: str) -> None:
    row = {"text": CALL, "u": HPLT["u"], "pii": [[5, 17]], "allowed": True, key: "keep"}
    for found, _ in (read(tmp_path, [row]), documents_of(parquet(tmp_path / "x.parquet", [row]))):
        assert [d.text for d in found] == ["Call [PII] on 555-1234."]


def test_bad_rows_say_file_line_and_reason_and_no_text(tmp_path: Path) -> None:
    found, left_out = read(tmp_path, [{"text": "good"}, "{secret", "[3]", "", {"text": 3}, {"txt": "secret"}])
    assert len(found) == 1 and left_out.bad == 4 and not any("secret" in row for row in left_out.bad_rows)
    places = [row.split(": ")[0].removeprefix(f"{tmp_path}/") for row in left_out.bad_rows]
    assert places == ["x.jsonl line 2", "x.jsonl line 3", "x.jsonl line 5", "x.jsonl line 6"]


# ---- filters ---------------------------------------------------------------------------------------------------------
@pytest.fixture()
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_filters.py").write_text("""if True:
        def keep(document): return len(document.text) > 3
        def mask(document): return document.text.replace("Ada", "X")
        def blank(document): return " "
        def fails(document): raise ValueError(document.text)
        def half(document): return "\\ud83d"
        def odd(document): return None""")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_filters"
    sys.modules.pop("my_filters", None)


def test_filters_keep_drop_and_replace(tmp_path: Path, filters: str) -> None:
    (long, short), _ = read(tmp_path, [{"text": "Ada wrote"}, {"text": "Ada"}])
    keep, mask, blank = (load_filter(f"{filters}:{name}") for name in ("keep", "mask", "blank"))
    assert keep(long) and not keep(short) and mask(long) and long.text == "X wrote" and not blank(long)
    assert keep.version == "sha256:" + hashlib.sha256((tmp_path / "my_filters.py").read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "told"), [("fails", "raised ValueError"), ("odd", "returned a NoneType"),
                                            ("half", "returned a text with half a surrogate pair")])
def test_a_broken_filter_is_named_with_the_place_and_no_text(tmp_path: Path, filters: str, name: str, told: str) -> None:
    [document], _ = read(tmp_path, [{"text": "secret"}])
    with pytest.raises(DataError, match=rf"x\.jsonl line 1: filter {filters}:{name} {told}") as caught:
        load_filter(f"{filters}:{name}")(document)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("path", ["nowhere:keep", "json:nothing", "json"])
def test_a_filter_that_is_not_there(path: str) -> None:
    with pytest.raises(DataError, match=rf"--filter {path}: cannot be imported.*package\.module:function"):
        load_filter(path)
