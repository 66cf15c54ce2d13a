"""Buffers of a stream: every record once a pass, and made again from where they begin."""

import gzip
import json

import numpy as np
import pytest

from lora_engine.data.dataset import prepare
from lora_engine.data.recipe import Recipe, Tokenising
from lora_engine.data.sampler import PackedSampler
from lora_engine.data.stream import ExampleStream, Place, StreamPart, streamed
from lora_engine.data.tracks import Reached, Track
from lora_engine.errors import UserError


def rows(name: str, count: int) -> str:
    return "".join(
        json.dumps({"prompt": f"{name} {i} ", "completion": "ab" * (i % 7 + 1)}) + "\n"
        for i in range(count)
    )


@pytest.fixture
def files(tmp_path):
    """30 rows in three files of three kinds."""
    (tmp_path / "a.jsonl").write_text(rows("a", 11))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows("b", 13).encode()))
    (tmp_path / "c.csv").write_text("prompt,completion\n" + "c,d\n" * 6)
    return tuple(sorted(tmp_path.iterdir()))


def stream(files, tokenizer, **options) -> ExampleStream:
    return ExampleStream("data", [StreamPart(files, Recipe())], tokenizer, **options)


def origins(dataset) -> list[str]:
    return [example.origin for example in dataset]


def walk(source: ExampleStream, count: int, place=None):
    """(place, origins) of some buffers."""
    place = place or source.begin
    for _ in range(count):
        dataset, after = source.buffer(place)
        yield place, origins(dataset)
        place = after


def test_every_record_comes_once_a_pass(files, tokenizer):
    seen = [origin for _, some in walk(stream(files, tokenizer, records=10), 6) for origin in some]
    assert len(set(seen[:30])) == 30 and sorted(seen[:30]) == sorted(seen[30:])


def test_a_buffer_has_no_record_twice_but_where_shares_want_it(files, tokenizer):
    for _, some in walk(stream(files, tokenizer, records=100), 3):
        assert len(some) == len(set(some)) == 30
    bad = files[0].with_name("d.jsonl")
    bad.write_text(rows("d", 2) + "{oops\n")
    parts = [StreamPart(files, Recipe(), 1.0), StreamPart((bad,), Recipe(), 1.0)]
    source = ExampleStream("data", parts, tokenizer, records=100)
    with pytest.raises(UserError, match=r"^data: 1 of \d+ records .*d\.jsonl:3: is not valid JSON"):
        source.first()


def test_files_come_in_another_order_each_time(files):
    track, reached, orders = Track(files, 0, 0), Reached(), set()
    for _ in range(6):
        chunks, reached = track.take(reached, 30, 1 << 20)
        orders.add(
            tuple(dict.fromkeys(row.origin.split(":")[0] for c in chunks for row in c.parsed()))
        )
    assert len(orders) > 1
    assert reached == Reached(5, 2, reached.offset, reached.row, 180)


@pytest.mark.parametrize("helpers", [0, 1])
def test_a_buffer_is_made_again_from_where_it_begins(files, tokenizer, helpers):
    whole = list(walk(stream(files, tokenizer, records=7), 9))
    for number in (0, 3, 8):
        place = Place.of(json.loads(json.dumps(whole[number][0])))
        again = stream(files, tokenizer, records=7, helpers=helpers)
        assert list(walk(again, 9 - number, place)) == whole[number:]
        again.close()


def test_shares_of_sources(tmp_path, tokenizer):
    for name, count in (("a", 5), ("b", 400)):
        (tmp_path / f"{name}.jsonl").write_text(rows(name, count))
    parts = [
        StreamPart((tmp_path / "a.jsonl",), Recipe(), 1.0),
        StreamPart((tmp_path / "b.jsonl",), Recipe(), 3.0),
    ]
    source = ExampleStream("data", parts, tokenizer, records=128)
    for _, some in walk(source, 3):
        of_a = sum("a.jsonl" in origin for origin in some)
        assert (of_a, len(some)) == (32, 128)


def test_what_is_held_out_is_never_trained_on(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(rows("a", 300))
    source = stream((tmp_path / "a.jsonl",), tokenizer, records=50, heldout=0.2, seed=1)
    heldout = source.heldout(None)
    trained = {origin for _, some in walk(source, 12) for origin in some}
    held = set(origins(heldout))
    assert not held & trained and len(heldout) == len(held)
    assert 20 < len(held) < 60 and len(trained) == pytest.approx(240, abs=25)
    assert origins(source.heldout(5)) == origins(heldout)[:5]
    with pytest.raises(UserError, match="nothing to learn from is held out of the first 200"):
        stream((tmp_path / "a.jsonl",), tokenizer, records=50, heldout=1e-9).heldout(None)


def test_no_record_is_tokenised_twice(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_text(rows("a", 400))
    seen, run = [], Tokenising.run

    def counted(tokenising, chunk):
        result = run(tokenising, chunk)
        seen.extend(result.store.origin(i) for i in range(len(result.store)))
        return result

    monkeypatch.setattr(Tokenising, "run", counted)
    source = stream((tmp_path / "a.jsonl",), tokenizer, records=100, heldout=0.2)
    source.first()
    assert len(seen) == 100  # a buffer is all that training waits for
    assert len(source.heldout(30)) == 30
    assert len(seen) == 200  # of as many buffers as hold out 30
    list(walk(source, 4))
    assert sorted(seen) == sorted(set(seen)) and len(seen) == 400


def test_pairs_and_weights_are_held_out_as_they_are(tmp_path, tokenizer):
    pairs = [
        {"prompt": f"p{i}", "chosen": "yes", "rejected": "no", "weight": 1 + i % 2}
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = stream((tmp_path / "a.jsonl",), tokenizer, records=40, heldout=0.5)
    heldout, trained = source.heldout(None), source.first()[0]
    whole = prepare(tmp_path / "a.jsonl", tokenizer)
    by_origin = {example.origin: example for example in whole}
    assert len(heldout) + len(trained) == 40 and len(heldout) > 5
    assert [by_origin[example.origin] for example in heldout] == list(heldout)
    assert dict(heldout.formats) == {"preference": len(heldout)}


def test_a_malformed_record_is_told_when_it_comes(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(rows("a", 20) + "{oops\n" * 3)
    source = stream((tmp_path / "a.jsonl",), tokenizer, records=10)
    (_, (place, _)) = walk(source, 2)
    with pytest.raises(UserError, match=r"3 of 3 records .*\n.*a\.jsonl:21"):
        source.buffer(source.buffer(place).after)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no example is left to learn from"):
        streamed(stream((tmp_path / "b.jsonl",), tokenizer, records=10))


def test_what_decides_a_stream_is_in_its_identity(files, tokenizer):
    one = stream(files, tokenizer).identity()
    assert stream(files, tokenizer).identity() == one
    others = {
        stream(files[:2], tokenizer).identity(),
        stream(files, tokenizer, records=100).identity(),
        stream(files, tokenizer, seed=1).identity(),
        stream(files, tokenizer, heldout=0.1).identity(),
    }
    files[2].write_text("prompt,completion\n" + "c,e\n" * 6)
    others.add(stream(files, tokenizer).identity())
    assert len(others | {one}) == 6


def test_buffers_are_packed_well(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(rows("some words", 2048))
    dataset, _ = stream((tmp_path / "a.jsonl",), tokenizer).first()
    lengths = np.array([len(example) for example in dataset])
    assert PackedSampler(lengths, 512).fill(0) > 0.97
