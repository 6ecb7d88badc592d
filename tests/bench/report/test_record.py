"""Records survive what happens to files: torn lines, second writers, foreign lines."""

import errno
import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from bench.errors import UserError
from bench.report.record import (
    COLUMNS,
    FILE,
    METRICS,
    SCENARIO,
    SCHEMA,
    Header,
    Keys,
    Record,
    counted,
    faults,
    is_written,
    read,
    writing,
)

HEADER = Header(
    "g", "hash", "a title", {"s1 idlg": 2, "s1 lambda_recovery(search='exact')": 3}, {"s1": {"k": 1}}
)


def record(trial, **values):
    names = (
        *("grid", "scenario", "dataset", "model", "weights", "batch_norm", "members", "classes", "protocol"),
        *("knowledge", "defense", "defense_revision", "attack", "attack_revision", "outcome", "reason"),
    )
    texts = dict.fromkeys(names, "x")
    return Record(trial=trial, **(texts | {"weight_seed": 0, "batch_size": 1, "sample": 0} | values))


def write(folder, *records, header=HEADER):
    with writing(folder) as writer:
        writer.header(header)
        writer.rows(records)
    return folder / FILE


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    rows = [record("a", success=True, psnr=12.5, reason="ü λ\n\u2028"), record("b", seconds=0.1)]
    write(tmp_path, *rows)
    run = read(tmp_path)
    assert run.headers == (HEADER,)
    assert run.rows == tuple(asdict(row) for row in rows)
    assert run.keys == {"a", "b"}
    assert read(tmp_path / FILE).rows == run.rows


def test_a_run_goes_on_in_the_same_file_under_one_header(tmp_path):
    write(tmp_path, record("a"))
    path = write(tmp_path, record("b"))
    assert len(lines_of(path)) == 3
    assert read(tmp_path).keys == {"a", "b"}


def test_a_larger_run_adds_its_header(tmp_path):
    write(tmp_path)
    larger = replace(HEADER, cells={"s1 idlg": 5, "s2 idlg": 1})
    write(tmp_path, header=larger)
    assert read(tmp_path).headers == (HEADER, larger)


def test_the_largest_number_that_was_asked_for_is_expected(tmp_path):
    write(tmp_path, header=replace(HEADER, cells={"s1 idlg": 5, "s2 a b": 1}))
    write(tmp_path)
    assert read(tmp_path).expected == {
        ("s1", "idlg"): 5,
        ("s2", "a b"): 1,
        ("s1", "lambda_recovery(search='exact')"): 3,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    path = write(tmp_path, record("a", psnr=value))
    assert json.loads(lines_of(path)[1])["psnr"] is None
    assert b"NaN" not in path.read_bytes()
    assert b"Infinity" not in path.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_a_torn_last_line_is_dropped_and_cut_on_the_next_write(tmp_path, kept):
    path = write(tmp_path, record("a"), record("b"))
    whole = lines_of(path)
    path.write_bytes(b"".join(whole[:2]) + whole[2][:kept])
    assert read(tmp_path).keys == {"a"}
    write(tmp_path, record("c"))
    assert read(tmp_path).keys == {"a", "c"}
    assert lines_of(path)[:2] == whole[:2]


def test_a_line_torn_within_a_character_is_dropped(tmp_path):
    path = write(tmp_path, record("a"), record("b", reason="λ"))
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("λ".encode()) + 1])
    assert read(tmp_path).keys == {"a"}


def test_a_whole_line_without_its_end_is_computed_again(tmp_path):
    path = write(tmp_path, record("a"), record("b"))
    path.write_bytes(path.read_bytes()[:-1])
    assert read(tmp_path).keys == {"a"}


def test_zeros_that_a_lost_disk_leaves_are_dropped(tmp_path):
    path = write(tmp_path, record("a"))
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    assert read(tmp_path).keys == {"a"}
    write(tmp_path, record("b"))
    assert read(tmp_path).keys == {"a", "b"}


def test_a_torn_header_leaves_a_new_file(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"grid": "g", "ce')
    write(tmp_path, record("a"))
    assert read(tmp_path).headers == (HEADER,)


FOREIGN = [
    "{}",
    "not json",
    "[]",
    "5",
    '"cells"',
    '{"trial": "b"}',
    '{"cells": {}}',
    '{"trial": []}',
    "\x00{}",
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_line_in_the_middle_is_one_line_that_names_it(tmp_path, foreign):
    path = write(tmp_path, record("a"))
    path.write_bytes(path.read_bytes() + foreign.encode() + b"\n")
    write_after = lines_of(path)[1]
    path.write_bytes(path.read_bytes() + write_after)
    assert f"{path}, line 3 is no record" in refusal(read, tmp_path)


def test_the_line_is_counted_as_an_editor_counts_it(tmp_path):
    path = write(tmp_path, record("a"))
    path.write_bytes(path.read_bytes() + b"\n\n{}\n")
    assert "line 5 is no record" in refusal(read, tmp_path)


def test_a_deeply_nested_line_is_one_line(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n")
    assert "line 2 is no record" in refusal(read, tmp_path)


def test_a_header_whose_cells_are_no_table_is_one_line(tmp_path):
    path = write(tmp_path)
    path.write_bytes(json.dumps(asdict(HEADER) | {"cells": 3}).encode() + b"\n")
    assert "line 1 is no record" in refusal(lambda: read(tmp_path).expected)


def test_a_row_of_another_schema_is_refused(tmp_path):
    path = write(tmp_path)
    other = asdict(record("a")) | {"schema": SCHEMA + 1}
    path.write_bytes(path.read_bytes() + json.dumps(other).encode() + b"\n")
    assert f"line 2 is no record of schema {SCHEMA}" in refusal(read, tmp_path)


@pytest.mark.parametrize(
    ("column", "value"),
    [("success", "yes"), ("psnr", [30.0]), ("sample", "1"), ("attack", None), ("seconds", {"s": 1})],
)
def test_a_column_of_another_type_is_one_line(tmp_path, column, value):
    path = write(tmp_path)
    other = asdict(record("a")) | {column: value}
    path.write_bytes(path.read_bytes() + json.dumps(other).encode() + b"\n")
    assert f"(ValueError: {column} is {str(value)!r})" in refusal(read, tmp_path)


def test_columns_of_a_later_version_are_left_out(tmp_path):
    path = write(tmp_path)
    more = asdict(record("a")) | {"colour": "green"}
    path.write_bytes(path.read_bytes() + json.dumps(more).encode() + b"\n")
    assert tuple(read(tmp_path).rows[0]) == COLUMNS


def test_a_trial_that_is_there_twice_is_read_once(tmp_path):
    write(tmp_path, record("a"), record("b"), record("a"))
    assert [row["trial"] for row in read(tmp_path).rows] == ["a", "b"]


def enter(folder):
    with writing(folder):
        pass


def whole(folder):
    """A run that has all it was asked for, in lines 2 to 6."""
    cells = [("idlg", range(2)), ("lambda_recovery(search='exact')", range(3))]
    rows = [
        record(f"{attack} {sample}", scenario="s1", attack=attack, sample=sample)
        for attack, samples in cells
        for sample in samples
    ]
    return write(folder, *rows)


def test_a_whole_run_has_no_faults(tmp_path):
    whole(tmp_path)
    assert faults(tmp_path) == []


def flipped(line):
    at = line.index(b'"outcome": "x"') + len(b'"outcome": "')
    return line[:at] + b"y" + line[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda lines: [*lines[:2], flipped(lines[2]), *lines[3:]],
         ["line 3 is not as it was written: its checksum differs"]),
        (lambda lines: [*lines, lines[1]], ["line 7 repeats trial idlg 0 of line 2"]),
        (lambda lines: [*lines, lines[1][:50]], ["line 7 is torn: the same run drops it"]),
        (lambda lines: [*lines, b"{}\n"], ["line 7 is no record of schema 1 (KeyError: 'schema')"]),
        (lambda lines: [*lines[:1], *lines[2:]], ["idlg on scenario s1: sample 0 of 2 missing"]),
        (lambda lines: lines[:3],
         ["lambda_recovery(search='exact') on scenario s1: samples 0-2 of 3 missing"]),
        (lambda lines: [lines[0].replace(b'"s1 idlg": 2', b'"s1 idlg": 1'), *lines[1:]],
         ["line 1 is not as it was written: its checksum differs",
          "idlg on scenario s1: nobody asked for sample 1"]),
        (lambda lines: [*lines[:5], lines[5].split(b', "crc32"')[0] + b"}\n"], ["line 6 has no checksum"]),
        (lambda lines: [*lines, b"\0" * 512], ["line 7 is torn: the same run drops it"]),
    ],
)  # fmt: skip
def test_every_fault_is_a_line(tmp_path, spoil, found):
    path = whole(tmp_path)
    path.write_bytes(b"".join(spoil(lines_of(path))))
    assert faults(tmp_path) == found


@pytest.mark.parametrize("bit", [3, 40, 77, 300, 800])
def test_any_bit_that_flips_in_a_row_is_found_and_nothing_is_built_on_it(tmp_path, bit):
    path = whole(tmp_path)
    lines = lines_of(path)
    spoilt = bytearray(lines[3])
    spoilt[bit] ^= 4
    path.write_bytes(b"".join([*lines[:3], bytes(spoilt), *lines[4:]]))
    assert any(fault.startswith("line 4 is no") for fault in faults(tmp_path))
    assert f"{path}, line 4 is no" in refusal(enter, tmp_path)


def test_a_damaged_row_is_read_but_named(tmp_path):
    path = whole(tmp_path)
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], flipped(lines[2]), *lines[3:]]))
    assert read(tmp_path).damaged == (3,)


def test_a_row_without_a_checksum_is_read_and_counts_as_done(tmp_path):
    path = write(tmp_path, record("a"))
    path.write_bytes(path.read_bytes() + json.dumps(asdict(record("b"))).encode() + b"\n")
    assert read(tmp_path).damaged == ()
    with writing(tmp_path) as writer:
        assert writer.done.having(["a", "b", "c"]) == [True, True, False]


def test_keys_tell_what_is_there():
    keys = Keys(f"{number:024x}" for number in range(0, 1000, 2))
    assert len(keys) == 500
    assert keys.having([f"{number:024x}" for number in range(-1, 1001)]) == [
        number % 2 == 0 and 0 <= number < 1000 for number in range(-1, 1001)
    ]
    assert Keys().having(["a"]) == [False]
    assert keys.having([]) == []


def test_what_is_done_takes_twelve_bytes_a_trial():
    assert Keys(map(str, range(1000)))._sorted.nbytes == 12_000


def test_a_run_is_counted_without_being_kept(tmp_path):
    write(tmp_path, record("a"), record("b", outcome="ok"))
    count = counted(tmp_path)
    assert (count.grid, count.wanted, count.outcomes) == ("g", 5, {"x": 1, "ok": 1})


def test_who_writes_is_seen_from_outside(tmp_path):
    assert not is_written(tmp_path)
    with writing(tmp_path):
        assert is_written(tmp_path)
    assert not is_written(tmp_path)


def test_a_disk_that_fills_up_leaves_whole_lines_and_the_run_goes_on(tmp_path):
    """A real limit, of the file's size: what didn't fit is cut off again."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from dataclasses import replace\n"
        "sys.path.insert(0, sys.argv[2]); from test_record import HEADER, record, write, writing\n"
        "write(Path(sys.argv[1]), record('a'))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try:\n  write(Path(sys.argv[1]), *(record(str(n)) for n in range(20)))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    folder = os.path.dirname(__file__)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), folder], capture_output=True, text=True
    )
    assert ended.stdout.startswith(f"UserError {tmp_path} can't be written: File too large")
    assert read(tmp_path).keys == {"a"}
    assert (tmp_path / FILE).read_bytes().endswith(b"\n")
    write(tmp_path, record("b"))
    assert read(tmp_path).keys == {"a", "b"}


def test_rows_without_a_header_are_refused(tmp_path):
    path = write(tmp_path, record("a"))
    path.write_bytes(lines_of(path)[1])
    assert "has no header line" in refusal(read, tmp_path)


def test_an_empty_folder_is_one_line(tmp_path):
    assert f"holds no {FILE}" in refusal(read, tmp_path)
    assert f"holds no {FILE}" in refusal(read, tmp_path / "nowhere")


def test_a_second_writer_is_refused_in_one_line(tmp_path):
    write(tmp_path, record("a"))
    before = (tmp_path / FILE).read_bytes()
    with writing(tmp_path):
        assert "another run is writing" in refusal(enter, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    enter(tmp_path)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bench.report.record import writing\n"
        "with writing(Path(sys.argv[1])):\n  print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"in\n"
        assert "another run is writing" in refusal(enter, tmp_path)
        other.kill()
    enter(tmp_path)


def test_a_folder_that_cant_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert "can't be written" in refusal(enter, tmp_path / "file")
    assert "can't be written" in refusal(enter, tmp_path / "file" / "below")
    assert "can't be written" in refusal(enter, tmp_path / ("a" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_leave_to_write_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    assert "can't be written: Permission denied" in refusal(enter, tmp_path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "can't be written: No space left" in refusal(write, tmp_path, record("a"))


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError("scheduler"), TimeoutError("worker"), BrokenPipeError()]
)
def test_what_goes_wrong_while_a_run_writes_is_not_blamed_on_the_folder(tmp_path, error):
    with pytest.raises(type(error)), writing(tmp_path):
        raise error


def test_the_named_columns_are_columns():
    assert set(METRICS) | set(SCENARIO) <= set(COLUMNS)
    assert not set(METRICS) & set(SCENARIO)


def test_a_packed_file_is_whole_and_a_damaged_one_is_one_line(tmp_path):
    with writing(tmp_path) as writer:
        writer.header(Header("g", "h", "", {"s a": 0}, {"s": {}}))
    packed = tmp_path / "r1.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / FILE).read_bytes()))
    assert faults(packed) == []
    for content in (b"no gzip", packed.read_bytes()[:-12]):
        packed.write_bytes(content)
        with pytest.raises(UserError, match=r"can.t be read: .*; fetch it again"):
            read(packed)
