"""JSON without the surprises of the standard reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bounds import cheap
from hypothesis import given
from hypothesis import strategies as st

from dsv4tools.checkpoint.strict_json import listed, parse_json, read_json_object, read_small_file, shown
from dsv4tools.errors import InputError, ResourceError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=15)


@given(VALUES)
def test_what_json_writes_is_read_back(value):
    assert parse_json(json.dumps(value).encode(), "file") == value


@given(st.binary(max_size=60))
def test_other_bytes_are_refused_or_are_what_the_standard_reader_reads(raw):
    try:
        value = parse_json(raw, "file")
    except InputError as e:
        assert "\n" not in str(e)  # noqa: PT017  - whatever the bytes: one line
        return
    assert value == json.loads(raw.decode())


@pytest.mark.parametrize(("raw", "message"), [
    (b"", "is not valid JSON"),
    (b"{", "is not valid JSON"),
    (b'{"a":1}x', "is not valid JSON"),
    (b"{'a':1}", "is not valid JSON"),
    (b'{"a":1,}', "is not valid JSON"),
    (b'"\xff"', "is not valid UTF-8 at byte 1"),
    (b"\xef\xbb\xbf{}", "is not valid JSON"),
    (b"NaN", "NaN is not a JSON number"),
    (b"[-Infinity]", "-Infinity is not a JSON number"),
    (b'{"a":{"b":1,"c":2,"b":1}}', "key 'b' appears twice in one JSON object"),
    (b'{"a":1,"\\u0061":1}', "key 'a' appears twice in one JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b"9" * 5000, "is not valid JSON"),
])
def test_refusals(raw, message):
    with cheap(), pytest.raises(InputError) as caught:
        parse_json(raw, "the file")
    assert message in str(caught.value)
    assert str(caught.value).startswith("the file: ")


def test_equal_keys_in_different_objects_are_fine():
    assert parse_json(b'{"a":{"a":1},"b":[{"a":1},{"a":2}]}', "file") == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}


@pytest.mark.parametrize(("raw", "message"), [(b"[]", "JSON list"), (b"1", "JSON int"), (b"null", "JSON NoneType")])
def test_a_file_must_hold_an_object(tmp_path, raw, message):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_json_object(path)


def test_size_is_capped_before_anything_is_parsed(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a":1}')
    assert read_json_object(path, max_bytes=7) == {"a": 1}
    with pytest.raises(InputError, match="is larger than 6 bytes"):
        read_json_object(path, max_bytes=6)
    with path.open("r+b") as file:
        file.truncate(1 << 40)   # a hole: reading it all would end badly
    with cheap(), pytest.raises(InputError, match=r"is larger than 1,000,000 bytes"):
        read_json_object(path, max_bytes=1_000_000)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_small_file(tmp_path / "link", max_bytes=9) == b"x"
    for path, message in ((tmp_path / "fifo", "is not a regular file"), (tmp_path, "is not a regular file"),
                          (Path("/dev/zero"), "is not a regular file"), (tmp_path / "missing", "is missing"),
                          (tmp_path / "dangling", "is missing"), (tmp_path / "file" / "below", "is missing")):
        with cheap(), pytest.raises(InputError, match=message):
            read_small_file(path, max_bytes=9)


def test_what_the_system_refuses_is_a_fault_of_resources(tmp_path, monkeypatch):
    with pytest.raises(ResourceError, match="cannot be read"):
        read_small_file(tmp_path / ("x" * 5000), max_bytes=9)
    path = tmp_path / "x"
    path.write_bytes(b"x")

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ResourceError, match="cannot be read: Permission denied"):
        read_small_file(path, max_bytes=9)


def test_messages_show_values_shortened():
    assert shown({"a": [1]}) == "{'a': [1]}"
    assert shown("x" * 1000) == "'" + "x" * 196 + "..."
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(1003)]).endswith(", 999 and 3 more")
