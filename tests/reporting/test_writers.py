"""Writers: their files can be read back, also after a crash."""

import json
import math
import os
import re
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.reporting.writers import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    read_records,
)


def _strict(path):
    """The file's lines by a parser that refuses NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text("utf-8")
    assert text.endswith("\n")
    return [
        json.loads(line, parse_constant=refuse) for line in text.splitlines()
    ]


def _write(path, steps):
    writer = JsonlWriter(path)
    for step in steps:
        writer.write({"train/loss": step / 2}, step=step)


def test_jsonl_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1234.56789)
    path = tmp_path / "made" / "on" / "demand" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"epoch": 1, "train/loss": 0.1, "name": "é\n"}, step=28)
    assert len(_strict(path)) == 1  # Readable while the run goes on.
    writer.write({"train/skipped_steps": np.int32(2), "none": None}, step=56)
    first = {"epoch": 1, "train/loss": 0.1, "name": "é\n"}
    second = {"train/skipped_steps": 2, "none": None}
    assert _strict(path) == [
        {"step": 28, "time": 1234.568, **first},
        {"step": 56, "time": 1234.568, **second},
    ]
    assert read_records(path) == _strict(path)


def test_jsonl_names_nonfinite_values_and_refuses_arrays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path).write(
        {"a": math.nan, "b": 1.0, "c": -math.inf, "d": np.float32("inf")},
        step=1,
    )
    (line,) = _strict(path)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, 1, None, None)
    assert line["nonfinite"] == ["a", "c", "d"]
    with pytest.raises(TypeError, match="'loss' is ndarray"):
        JsonlWriter(path).write({"loss": np.zeros(3)}, step=1)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=8).map(sorted),
    limit=st.integers(0, 60),
    cut=st.integers(0, 10_000),
)
def test_jsonl_survives_a_cut_at_any_byte(tmp_path_factory, steps, limit, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    _write(path, steps)
    data = path.read_bytes()
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    # A line counts if all its bytes are there, its newline or not.
    ends = [m.start() for m in re.finditer(b"\n", data)]
    whole = [s for s, end in zip(steps, ends, strict=True) if end <= cut]
    assert [r["step"] for r in read_records(path)] == whole
    JsonlWriter(path, resume_from_step=limit).write({}, step=99)
    kept = [s for s in whole if s <= limit]
    assert [r["step"] for r in _strict(path)] == [*kept, 99]


def test_damage_in_the_middle_and_a_missing_file_are_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with refuses(r"metrics\.jsonl"):
        read_records(path)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with refuses(r"metrics\.jsonl, line 2.*delete"):
        read_records(path)


def test_a_failed_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3])
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with refuses("No space left"):
        JsonlWriter(path, resume_from_step=1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def _events(directory):
    """Events of all files, read as TFRecords without tensorboardX's reader.

    A record is: length (uint64), its checksum (4 bytes), that many bytes,
    their checksum (4 bytes).
    """
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        start = 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            start += 12
            events.append(Event.FromString(data[start : start + length]))
            start += length + 4
        assert start == len(data)
    return events


def test_tensorboard_events_are_readable(tmp_path):
    directory = tmp_path / "tb"
    writer = TensorBoardWriter(directory)
    writer.write({"train/loss": 2.5, "validation/ndcg@100": None}, step=7)
    writer.write({"validation/ndcg@100": 0.25, "note": "hi"}, step=8)
    writer.close()
    writer.close()
    values = {
        (event.step, value.tag): value
        for event in _events(directory)
        for value in event.summary.value
    }
    assert set(values) == {
        (7, "train/loss"),
        (8, "validation/ndcg_100"),
        (8, "note/text_summary"),
    }
    assert values[7, "train/loss"].simple_value == 2.5
    assert values[8, "validation/ndcg_100"].simple_value == 0.25


def test_tensorboard_events_are_on_the_disk_after_a_flush(tmp_path):
    """A process that is killed leaves what its checkpoints count on."""
    writer = MultiWriter([TensorBoardWriter(tmp_path)])
    for step in range(1, 4):
        writer.write({"loss": 1.0}, step=step)
    writer.flush()
    steps = [e.step for e in _events(tmp_path) if e.summary.value]
    assert steps == [1, 2, 3]
    writer.close()


def test_tensorboard_resume_keeps_files_and_purges(tmp_path):
    for resume, step in ((0, 1), (1, 2)):
        writer = TensorBoardWriter(tmp_path, resume_from_step=resume)
        writer.write({"loss": 1.0}, step=step)
        writer.close()
    # Two files, though both were opened within one second.
    assert len(list(tmp_path.iterdir())) == 2
    events = _events(tmp_path)
    steps = [e.step for e in events if e.summary.value]
    assert steps == [1, 2]
    # TensorBoard drops what is at or after a session start's step.
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [1, 2]
