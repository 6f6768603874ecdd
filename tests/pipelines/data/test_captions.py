"""Captions for a tokenizer: which ones, and how many requests they cost."""

import pipelines.data.captions as module
from pipelines.data.captions import read_captions
from pipelines.data.index import load_index
from pipelines.data.spec import SampleSpec
from tests.pipelines.data.shards import pairs, write_shards, write_tar


def test_every_caption_comes_once_in_order_and_chunks_are_read_together(tmp_path, monkeypatch):
    index = write_shards(tmp_path, samples=90, per_shard=20, chunk_samples=2)
    groups = []
    real = module.read_chunks

    def counted(index, wanted):
        groups.append(list(wanted))
        return real(index, groups[-1])

    monkeypatch.setattr(module, "read_chunks", counted)
    assert list(read_captions(index, SampleSpec(8), 1000)) == [f"number {n}" for n in range(90)]
    assert [len(group) for group in groups] == [32, 13]
    some = list(read_captions(index, SampleSpec(8), 10))
    assert len(some) == 10 and len({int(caption.split()[1]) // 20 for caption in some}) == 5


def test_samples_without_a_caption_and_damaged_chunks_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.read._BACKOFF_SECONDS", 0.001)
    write_tar(tmp_path / "a.tar", [*pairs(2), ("x.png", b""), ("y.txt", b" "), *pairs(40, first=10)])
    index = load_index(str(tmp_path), progress=False)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[index.sidecar(0).chunks[1][0] + 600] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    assert list(read_captions(index, SampleSpec(8), 100)) == [f"number {n}" for n in (0, 1, *range(10, 38))]


def test_a_bar_is_shown_only_where_it_takes_long(tmp_path, monkeypatch):
    index = write_shards(tmp_path, samples=8, per_shard=8, chunk_samples=2)
    started, stopped = [], []
    monkeypatch.setattr(module.Progress, "start", lambda self: started.append(self))
    monkeypatch.setattr(module.Progress, "stop", lambda self: stopped.append(self))
    monkeypatch.setattr(module, "_CHUNKS_AT_ONCE", 1)
    assert len(list(read_captions(index, SampleSpec(8), 8))) == 8 and not started and not stopped
    monkeypatch.setattr(module, "_QUIET_SECONDS", -1)
    assert len(list(read_captions(index, SampleSpec(8), 8))) == 8 and len(started) == len(stopped) == 1
