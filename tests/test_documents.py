"""Documents out of files and data sets of all kinds, and what is wrong with them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pretrain.errors import DataError
from tokenizer.documents import find_inputs, read, read_documents


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def test_documents_of_all_kinds_of_files(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\nline"}, {"text": ""}, {"text": "é"}])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'\n{"text": "packed"}\n   \n{"text": "\\u00e9"}'))
    plain = tmp_path / "c.txt"
    plain.write_bytes(b"kept\r\nas it is\n")
    other = tmp_path / "d.md.gz"
    other.write_bytes(gzip.compress(b"# also"))
    found = list(read_documents([lines, packed, plain, other]))
    assert found == ["one\nline", "", "é", "packed", "é", "kept\r\nas it is\n", "# also"]
    assert list(read_documents([write_jsonl(lines, [{"body": "x"}])], "body")) == ["x"]


def test_progress_adds_up_to_the_bytes_of_the_files(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * k} for k in range(100)])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    steps = []
    list(read_documents([lines, packed], progress=steps.append))
    assert sum(steps) == lines.stat().st_size + packed.stat().st_size
    assert min(steps) >= 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ('{"text": "x"}'.encode("utf-16-be"), "not JSON"),
        (b'{"other": "x"}', "no field 'text'"),
        (b'{"text": null}', "no text in the field 'text'"),
        (b'["text"]', "no text in the field 'text'"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=f"bad.jsonl: line 3 .*{message}"):
        list(read_documents([path]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    plain = tmp_path / "latin.txt"
    plain.write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"latin.txt: line 2 is not UTF-8"):
        list(read_documents([plain]))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(read_documents([cut]))
    cut.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(read_documents([cut]))
    with pytest.raises(DataError, match=r"absent\.jsonl: not there"):
        list(read_documents([tmp_path / "absent.jsonl"]))


TABLE = pyarrow.table({"text": [f"row {k}" for k in range(2500)], "number": list(range(2500))})


def write_table(path, table=TABLE):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    else:
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_tables_are_read_by_datasets(tmp_path, name):
    path = write_table(tmp_path / name)
    assert list(read_documents([path])) == TABLE["text"].to_pylist()
    [source] = find_inputs([path])
    for skip in (1, 999, 1000, 2499, 2500):
        assert list(read(source, skip=skip)) == TABLE["text"].to_pylist()[skip:]
    with pytest.raises(DataError, match=r"no field 'body'.*text, number"):
        list(read_documents([path], "body"))
    with pytest.raises(DataError, match="row 0 has no text in the field 'number'"):
        list(read_documents([path], "number"))
    holes = TABLE.slice(0, 5).set_column(0, "text", pyarrow.array(["a", None, "b", None, "c"]))
    found = list(read(find_inputs([write_table(path, holes)])[0]))
    assert [f for f in found if isinstance(f, str)] == ["a", "b", "c"]
    assert "row 3 has no text" in str(found[3])
    assert "row 3 has no text" in str(next(read(find_inputs([path])[0], skip=3)))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        list(read_documents([path]))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    # A folder serves as the hub: `load_dataset` takes either, with configs and splits.
    folder = tmp_path / "owner" / "texts"
    for config, word in (("en", "one"), ("fr", "un")):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            write_jsonl(folder / config / f"{split}.jsonl", [{"text": f"{word} {split}"}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {c}/{s}.jsonl\n" for s in ("train", "test"))
            for c in ("en", "fr")
        )
        + "---\n"
    )
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(["hub:./owner/texts:fr"])) == ["un train"]
    assert list(read_documents(["hub:./owner/texts:en:test"])) == ["one test"]
    with pytest.raises(DataError, match=r"hub:./owner/texts:de: cannot be read"):
        list(read_documents(["hub:./owner/texts:de"]))


def test_zstandard_in_several_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frames = [b'{"text": "one"}\n{"te', b'xt": "two"}\n']
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    assert list(read_documents([path])) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read"):
        list(read_documents([path]))


def test_globs_are_sorted_and_nothing_is_read_twice(tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert list(read_documents([f"{tmp_path}/*.jsonl"])) == ["a", "b", "c"]
    assert list(read_documents([tmp_path / "c.jsonl", f"{tmp_path}/[ab].jsonl"])) == ["c", "a", "b"]
    with pytest.raises(DataError, match=r"b\.jsonl: stands there twice"):
        find_inputs([tmp_path / "b.jsonl", f"{tmp_path}/*.jsonl"])
    with pytest.raises(DataError, match=r"none\*: not there"):
        find_inputs([f"{tmp_path}/*.jsonl", f"{tmp_path}/none*"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_any_position_is_found_again_and_all_bytes_are_seen(tmp_path, name):
    texts = [f"text {k}" for k in range(50)]
    content = b"\n".join(b'{"text": "%s"}\n' % t.encode() for t in texts) + b"\n \n"
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    path = tmp_path / name
    path.write_bytes(pack(content))
    [source] = find_inputs([path])
    whole = list(read(source))
    assert whole == ([content.decode()] if name == "a.txt" else texts)
    for skip in (0, 1, len(whole) - 1, len(whole)):
        seen = []
        assert (
            list(read(source, used=lambda part, s=seen: s.append(bytes(part)), skip=skip))
            == (whole[skip:])
        )
        assert b"".join(seen) == path.read_bytes()
