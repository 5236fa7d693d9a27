"""Targets of times: every text is made from the time that it means."""

from __future__ import annotations

import datetime
import json

import pandas as pd
import polars as pl

from vaecf.data import text_files
from vaecf.data.readers import read_ratings
from vaecf.errors import VaecfError

_BAD = (
    "", "NULL", "soon", "2024-13-01", "2024-02-30", "1,5", "nan", "inf", "--",
    "12:30", "2024-02-29 25:00", "29.02.2024", "2024-02-29 10:00 Uhr", "0x10",
    "1_000", "true",
)  # fmt: skip

_PARTS = {
    "train": 0, "Training": 0, "FALSE": 0, "0": 0, "val": 1, "valid": 1,
    "Validation": 1, "test": 2, "true": 2, "1": 2, "TESTING": 2,
}  # fmt: skip


def _number(rng):
    value = rng.choice(
        [rng.randint(-(2**62), 2**62), rng.randint(0, 9), 1_700_000_000]
    )
    return str(value), value


def _decimal(rng):
    value = rng.choice([rng.uniform(-1e12, 1e12), rng.random(), 5e9])
    return repr(value), value


def _date(rng):
    if rng.random() < 0.05:  # another zone may have no such year
        hours = rng.randint(-14, 14)
        zone = datetime.timezone(datetime.timedelta(hours=hours))
        day = rng.choice([(1, 1, 1), (9999, 12, 31)])
        time = datetime.datetime(*day, rng.randrange(24), tzinfo=zone)
        try:
            utc = time.astimezone(datetime.UTC).replace(tzinfo=None)
        except OverflowError:
            utc = None
        return time.isoformat(), utc
    first = datetime.datetime(1900, 1, 1)
    time = first + datetime.timedelta(days=rng.randrange(60_000))
    if rng.random() < 0.3:
        return time.date().isoformat(), time
    digits = rng.choice(["minutes", "seconds", "milliseconds", "microseconds"])
    time += datetime.timedelta(minutes=rng.randrange(1440))
    if digits != "minutes":
        time += datetime.timedelta(seconds=rng.randrange(60))
    if digits == "milliseconds":
        time += datetime.timedelta(milliseconds=rng.randrange(1000))
    if digits == "microseconds":
        time += datetime.timedelta(microseconds=rng.randrange(10**6))
    text = time.isoformat(rng.choice(" T"), digits)
    if rng.random() < 0.5:
        return text, time
    if rng.random() < 0.3:
        return f"{text}Z", time
    minutes = rng.randrange(-14 * 60, 14 * 60)
    sign, (hours, rest) = "+-"[minutes < 0], divmod(abs(minutes), 60)
    zone = f"{sign}{hours:02d}{rng.choice([':', ''])}{rest:02d}"
    return text + zone, time - datetime.timedelta(minutes=minutes)


def times(rng, folder):
    """Times of a file or a frame are those of the texts, or are refused."""
    kind = rng.choice([_number, _decimal, _date])
    made = [kind(rng) for _ in range(rng.randint(1, rng.choice([3, 30])))]
    if kind is _decimal and rng.random() < 0.5:
        made = [(text, value) if rng.random() < 0.7 else ("7", 7)
                for text, value in made]  # fmt: skip
    texts = [text for text, _ in made]
    is_bad = rng.random() < 0.3
    if is_bad:
        texts[rng.randrange(len(texts))] = rng.choice(_BAD)
    is_bad |= any(value is None for _, value in made)
    words = [rng.choice([*_PARTS]) for _ in texts]
    if rng.random() < 0.1:
        is_bad, words[-1] = True, rng.choice(["", "x", "2", "None"])
    columns = {
        "item": range(len(texts)),
        "time": texts,
        "split": words,
        "user": [1] * len(texts),
    }
    text_files.BLOCK_BYTES = rng.choice([7, 100, 1 << 24])
    form = rng.choice(["csv", "json", "pandas", "polars"])
    source = folder / f"x.{form}"
    if form == "csv":
        space = rng.choice(["", " "])
        rows = [f"{i},{space}{t},{words[i]},1" for i, t in enumerate(texts)]
        source.write_text("\n".join(["item,time,split,user", *rows, ""]))
    elif form == "json":
        rows = pl.DataFrame(columns).to_dicts()
        source.write_text("\n".join(map(json.dumps, rows)))
    else:
        source = {"pandas": pd, "polars": pl}[form].DataFrame(columns)
    try:
        found = read_ratings(source, more=("time", "split"))
    except VaecfError as error:
        assert is_bad, error
        raise
    assert not is_bad, texts
    assert found.item_ids[found.item].tolist() == [*range(len(texts))]
    assert found.time.tolist() == [value for _, value in made]
    assert found.part.tolist() == [_PARTS[word] for word in words]
    return "read"
