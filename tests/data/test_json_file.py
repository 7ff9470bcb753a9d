"""Rows of JSON files: any file gives what reading it at once gives, in memory that does not grow with it."""

import codecs
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latefusion.data import json_file
from latefusion.data.json_file import json_records
from latefusion.data.samples import RECORD

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "messages", "é", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def reasons_of(path) -> list:
    return [json.loads(row[RECORD]) for row in json_records(str(path), "")]


def expected(rows: list) -> list:
    return [row if isinstance(row, dict) else f"is {type(row).__name__}, not an object" for row in rows]


@settings(deadline=None, max_examples=30)
@example(rows=[0.5, 12, 1e9], piece=1, bom=False, indent=None)  # numbers that are cut where one could end
@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 9), st.booleans(), st.sampled_from([None, 1]))
def test_any_list_and_any_lines_give_their_rows_piece_by_piece(tmp_path_factory, rows, piece, bom, indent):
    folder = tmp_path_factory.mktemp("json")
    mark = codecs.BOM_UTF8 if bom else b""
    text = json.dumps(rows, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    (folder / "rows.json").write_bytes(mark + b" \r\n" + text + b"\n")
    lines = b"\r\n".join(json.dumps(row).encode() for row in rows)
    (folder / "rows.jsonl").write_bytes(mark + lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "PIECE", piece)
        assert reasons_of(folder / "rows.json") == expected(
            json.loads(text.decode("utf-8", "surrogateescape"))
        )
        if not lines.lstrip().startswith(b"["):  # which is a list
            assert reasons_of(folder / "rows.jsonl") == expected(rows)


ROW = '{"id": "x", "messages": []}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{ROW},]", "Expecting value, in row 1"),
        (f"[{ROW} {ROW}]", "'{' where ',' should be, in row 1"),
        (f"[{ROW}", "'the end' where ',' should be, in row 1"),
        (f"[{ROW}] and more", "'a' where 'the end' should be, in row 1"),
        (f'[{ROW}, {{"id": "y', "Unterminated string starting at, in row 1"),
        (f"[{ROW}, " + "[" * 100_000, "maximum recursion depth exceeded .*, in row 1"),
        (
            json.dumps({"data": [1]}, indent=1),
            "neither a JSON list nor JSON lines: its first line is not JSON",
        ),
    ],
)
def test_a_damaged_list_is_refused_with_the_row_where_it_breaks(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json is .*{message}"):
        reasons_of(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        ('{"id": ' + "1" * 5000 + "}", "is not JSON (Exceeds the limit (4300 digits)"),
        ("{oh", "is not JSON (Expecting property name"),
        ("null", "is NoneType, not an object"),
        ("\0\0", "is not JSON (Expecting value"),
    ],
)
def test_a_line_that_is_no_row_costs_itself_alone(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(f"{ROW}\n{line}\n{ROW}\n")
    before, broken, after = reasons_of(tmp_path / "x.jsonl")
    assert before == after == json.loads(ROW) and broken.startswith(message)


def test_a_row_s_own_words_are_not_taken_for_ours(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"broken": "is fun", "record": "x", "id": ""}\n{"id": null}\n{"id": 0}'
    )
    rows = list(json_records(str(tmp_path / "x.jsonl"), ""))
    assert json.loads(rows[0][RECORD])["broken"] == "is fun"
    assert [row["id"] for row in rows] == ["0", "1", "0"]  # those without a name have their number


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_file, "PIECE", 1 << 14)
    row, n = json.dumps({"id": "x", "messages": ["what is it? " * 40]}), 8000
    joined = "\n".join([row] * n) if name.endswith("l") else f"[{', '.join([row] * n)}]"
    (tmp_path / name).write_text(joined)
    tracemalloc.start()
    assert sum(1 for _ in json_records(str(tmp_path / name), "")) == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(joined) / 10
