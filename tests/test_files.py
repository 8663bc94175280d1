"""Files are whole or not there, and a broken one is named."""

import pytest

from searchr1_lib.files import read_json, read_json_lines, whole_folder, write_json, write_json_lines


def test_what_is_written_is_read(tmp_path):
    value = {"é": [1, None, "\ud800"]}
    write_json(tmp_path / "deep" / "a.json", value)
    assert read_json(tmp_path / "deep" / "a.json") == value
    write_json_lines(tmp_path / "a.jsonl", (value for _ in range(3)))
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [value] * 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": \xff}')
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n{"n"\n{"n": 4}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3"):
        list(read_json_lines(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: invalid literal"):
        list(read_json_lines(tmp_path / "a.jsonl", lambda row: int(row["n"])))


def test_a_line_that_a_crash_cut_off_is_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}')
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [{"n": 1}]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with whole_folder(folder) as part:
            (part / "below").mkdir()
            (part / "below" / text).write_text(text)
    with pytest.raises(OSError, match="disk full"), whole_folder(folder) as part:
        (part / "half").write_text("half")
        raise OSError("disk full")
    assert [f.name for f in folder.rglob("*")] == ["below", "new"] and list(folder.parent.iterdir()) == [folder]
