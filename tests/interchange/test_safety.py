"""Files are data: nothing in them is executed, and what is too large, twice there, or not what it says is refused."""

import ast
import base64
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offprompts_env.errors import DataError, OffPromptsError, StorageError
from offprompts_env.interchange import (
    convert_parquet,
    from_csv,
    from_huggingface,
    from_json_lines,
    from_parquet,
    tables,
    to_huggingface,
    to_json_lines,
    to_parquet,
)
from offprompts_env.manifest import MANIFEST
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, make_log

ROOT = Path(__file__).parents[2]
PROMPTS = PromptSet(np.eye(3), ("funny", "sad", "old"))


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.fixture
def target(tmp_path: Path) -> Any:
    """Return the file that is there once a bomb has gone off; the test fails if it is there at the end."""
    file = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists(), "the bomb works"
    file.unlink()
    yield file
    assert not file.exists(), "something in a data file was executed"


def write(path: Path, **changes: Any) -> Path:
    columns: dict[str, Any] = {"context": [[1.0], [2.0]], "action": ["sad", "old"], "reward": [0.0, 1.0]}
    columns |= {"sentence": ["a", "b"]} | changes
    pq.write_table(pa.table(columns), path)
    return path


def read(file: Any) -> LoggedDataset:
    return from_parquet(file, PROMPTS, query=None, output=None)


# --------------------------------------------------------------------------------------------- nothing is executed

READERS: dict[str, tuple[str, Callable[..., LoggedDataset]]] = {
    "parquet": ("x.parquet", from_parquet),
    "json": ("x.jsonl", from_json_lines),
    "json.gz": ("x.jsonl.gz", from_json_lines),
    "csv": ("x.csv", from_csv),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pickle", "npz", "torch"])
def test_a_pickle_by_another_name(tmp_path: Path, target: Path, reader: str, kind: str) -> None:
    name, load = READERS[reader]
    file = tmp_path / name
    with file.open("wb") as handle:
        if kind == "pickle":
            pickle.dump(Bomb(target), handle)
        elif kind == "npz":
            np.savez(handle, context=np.array([Bomb(target)], dtype=object))
        else:
            import torch

            torch.save(Bomb(target), handle)
    with pytest.raises((StorageError, DataError), match=name):
        load(file, PROMPTS)


@pytest.mark.parametrize("column", ["context", "action", "reward", "sentence"])
def test_a_pickle_in_a_column_of_bytes(tmp_path: Path, target: Path, column: str) -> None:
    bombs = [pickle.dumps(Bomb(target))] * 2
    with pytest.raises(DataError, match=rf"{column}: expected (numbers|text), got binary in row 0 of .*x.parquet"):
        read(write(tmp_path / "x.parquet", **{column: bombs}))


def test_a_pickle_in_a_column_that_nobody_asked_for(tmp_path: Path, target: Path) -> None:
    assert len(read(write(tmp_path / "x.parquet", other=[pickle.dumps(Bomb(target))] * 2))) == 2


@pytest.mark.parametrize("name", [b"arrow.py_extension_type", b"somebody.type"])
def test_a_pickle_in_the_type_of_a_column(tmp_path: Path, target: Path, name: bytes) -> None:
    # So Arrow kept extension types written in Python once; reading them ran what was in there (CVE-2023-47248).
    extension = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": pickle.dumps(Bomb(target))}
    fields = [pa.field("context", pa.float64(), metadata=extension), ("action", pa.int64()), ("reward", pa.float64())]
    table = pa.table([[1.0, 2.0], [0, 1], [0.5, 1.5]], schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "x.parquet")
    schema = pq.read_metadata(tmp_path / "x.parquet").metadata[b"ARROW:schema"]
    assert pickle.dumps(Bomb(target))[:8] in base64.b64decode(schema)
    assert read(tmp_path / "x.parquet").context.tolist() == [[1], [2]]


def test_a_pickle_in_the_metadata(tmp_path: Path, target: Path) -> None:
    table = pa.table({"context": [1.0], "action": [0], "reward": [0.5]})
    keys = (b"pandas", b"huggingface", b"x")
    pq.write_table(
        table.replace_schema_metadata(dict.fromkeys(keys, pickle.dumps(Bomb(target)))), tmp_path / "x.parquet"
    )
    assert len(read(tmp_path / "x.parquet")) == 1
    pq.write_table(table.replace_schema_metadata({b"offprompts": pickle.dumps(Bomb(target))}), tmp_path / "x.parquet")
    with pytest.raises(StorageError, match=r"x.parquet: expected a header .* cannot read it"):
        read(tmp_path / "x.parquet")


def test_a_dataset_with_a_script(tmp_path: Path, target: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "somebody"
    to_huggingface(make_log(5)).save_to_disk(folder)
    for name in ("somebody.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(target)!r}).touch()\n")
    assert_same(from_huggingface(datasets.load_from_disk(folder)), make_log(5))
    with pytest.raises(DataError, match=r"expected a datasets.Dataset, got PosixPath|WindowsPath"):
        from_huggingface(folder)  # type: ignore[arg-type]


def test_no_reader_can_run_code() -> None:
    """What would run code from a file is not even named in this package."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "eval", "exec"}
    for path in sorted((ROOT / "offprompts_env").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, path
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


# --------------------------------------------------------------------------------------------------- what is too large


def test_a_text_of_many_bytes(tmp_path: Path) -> None:
    long = "x" * (tables.LONGEST_TEXT + 1)
    rows = ["a"] * 9 + [long]
    columns = {"context": [1.0] * 10, "action": ["sad"] * 10, "reward": [0.0] * 10, "sentence": rows}
    for dictionary in (True, False):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet", use_dictionary=dictionary)
        with pytest.raises(
            DataError,
            match=r"sentence: expected a text of at most 1,048,576 bytes, got 1,048,577 in row 9 of .*x.parquet",
        ):
            read(tmp_path / "x.parquet")
    lines = [json.dumps({name: values[i] for name, values in columns.items()}) for i in range(10)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"sentence: .* got 1,048,577 in line 10 of .*x.jsonl"):
        from_json_lines(tmp_path / "x.jsonl", PROMPTS, query=None, output=None)


def test_texts_too_large_by_the_footer_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.parquet", sentence=["x" * 5000, "y" * 5000])
    monkeypatch.setattr("offprompts_env.interchange.parquet.LONGEST_TEXT", 1000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: pytest.fail("rows were read"))
    with pytest.raises(
        DataError, match=r"sentence: expected texts of at most 1,000 bytes, .*x.parquet has 2 rows with"
    ):
        read(tmp_path / "x.parquet")


def test_a_text_that_is_stored_once_is_held_once(tmp_path: Path) -> None:
    """A file of 2 MB whose texts would take 100 GB if each row had its own."""
    n = 200_000
    text = pa.array(["x" * 500_000, "y"])
    sentence = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, dtype=np.int32)), text)
    columns = {"context": np.ones(n), "action": np.zeros(n, dtype=np.int8), "reward": np.ones(n), "sentence": sentence}
    # Without the Arrow schema, which would say that it is a dictionary.
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 2e6
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from offprompts_env.interchange import from_parquet; import numpy as np\n"
        "log = from_parquet(sys.argv[1], ['a'], embeddings=[[1.0]], query=None, output=None)\n"
        "print(len(log), len(log.sentence[-1]), len(set(map(id, log.sentence))) < 10)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.parquet")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["200000", "500000", "True"], result.stderr


def test_texts_that_are_no_unicode(tmp_path: Path) -> None:
    sentence = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    with pytest.raises(DataError, match=r"damaged rows from row 0 of .*x.parquet on: .*[Ii]nvalid UTF8"):
        read(write(tmp_path / "x.parquet", sentence=sentence))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    file = to_parquet(make_log(500), tmp_path / "x.parquet")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(StorageError, match=r"x.parquet: expected a Parquet file, cannot read it"):
        from_parquet(file)


def test_damage_anywhere_is_an_error_of_ours_or_goes_unnoticed(tmp_path: Path) -> None:
    """A flipped byte may change a number; it never crashes, hangs, or raises something else."""
    content = bytearray(to_parquet(make_log(30), tmp_path / "x.parquet").read_bytes())
    for position in np.random.default_rng(0).integers(len(content), size=150):
        damaged = content.copy()
        damaged[position] ^= 0xFF
        (tmp_path / "x.parquet").write_bytes(damaged)
        with contextlib.suppress(OffPromptsError):
            from_parquet(tmp_path / "x.parquet")


# --------------------------------------------------------------------------------- files that do not belong together


def test_mixed_catalogues(tmp_path: Path) -> None:
    to_parquet(make_log(5, n_prompts=7), tmp_path / "a.parquet")
    to_parquet(make_log(6, n_prompts=8), tmp_path / "b.parquet")
    for load in (from_parquet, lambda files: convert_parquet(files, tmp_path / "log")):
        with pytest.raises(DataError, match=r"b.parquet: expected the prompt catalogue .* as in .*a.parquet, got"):
            load(f"{tmp_path}/*.parquet")
    assert not (tmp_path / "log").exists()


def test_a_file_without_a_catalogue_among_others(tmp_path: Path) -> None:
    log = make_log(5)
    to_parquet(log, tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").replace_schema_metadata(None), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: expected a prompt catalogue as in .*a.parquet, .* pass prompts="):
        from_parquet(tmp_path)
    assert len(from_parquet(tmp_path, log.prompts)) == 10


def test_mixed_environments(tmp_path: Path) -> None:
    from dataclasses import replace

    log = make_log(5)
    to_parquet(log, tmp_path / "a.parquet")
    for other, words in (("Other-v0", "environment Some-v0"), ("Some-v0", "environment config {.*}")):
        metadata = LogMetadata(other, {"n_prompts": 8}, 1)
        to_parquet(replace(log, metadata=metadata), tmp_path / "b.parquet")
        with pytest.raises(DataError, match=rf"b.parquet: expected the {words} as in .*a.parquet, got"):
            from_parquet(tmp_path)


def test_a_file_named_twice(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").symlink_to(file)
    for files in ([file, file], tmp_path, [file, tmp_path / "x" / ".." / "a.parquet"]):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"(a|b).parquet: expected every file once, but it is .*a.parquet again"):
            read(files)


def test_a_copied_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", reward=[5.0, 6.0])  # of the same size
    with pytest.warns(
        UserWarning, match=r"b.parquet has the same content as .*a.parquet, so their rows count twice"
    ) as found:
        assert len(read(tmp_path)) == 6
    assert [warning.filename for warning in found] == [__file__]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes")
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(StorageError, match="expected a file, found something else"):
        read(tmp_path / "x.parquet")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").symlink_to(tmp_path / "x.parquet")
    for files in (tmp_path, f"{tmp_path}/*.parquet", [tmp_path / "x.parquet"]):
        with pytest.raises(StorageError, match="expected a file"):
            read(files)


# -------------------------------------------------------------------------------------------------- versions and damage


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    to_parquet(make_log(5), path)
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"offprompts"])
    change(header)
    pq.write_table(table.replace_schema_metadata({b"offprompts": json.dumps(header)}), path)
    return path


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda h: h.update(version=2), "expected format version 1 or older, got 2; upgrade with: pip install -U"),
    "no version": (lambda h: h.pop("version"), "expected format version 1 or older, got None"),
    "other": (lambda h: h.update(format="x"), "expected a header of format"),
    "no prompts": (lambda h: h.pop("prompts"), "damaged header: KeyError 'prompts'"),
    "no base64": (lambda h: h["prompts"].update(float32_base64="é"), "damaged header: ValueError"),
    "shape": (lambda h: h["prompts"].update(shape=[8, 3]), "damaged header: ValueError"),
    "huge shape": (lambda h: h["prompts"].update(shape=[2**40, 2**40]), "damaged header: ValueError"),
    "texts": (lambda h: h["prompts"].update(texts=[1] * 7), "damaged header: ConfigError"),
    "other texts": (lambda h: h["prompts"].update(texts=list("abcdefg")), "expected prompts with fingerprint"),
    "metadata": (lambda h: h["metadata"].update(surprise=1), "damaged header: TypeError"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_fit(tmp_path: Path, case: str) -> None:
    change, words = HEADERS[case]
    with pytest.raises(StorageError, match=rf"x.parquet: {words}"):
        from_parquet(with_header(tmp_path / "x.parquet", change))


# ------------------------------------------------------------------------------------------- logs of our own format


@pytest.mark.parametrize("name", ["../secret.parquet", "sub/shard-000000.parquet", "other.parquet"])
def test_a_manifest_that_names_other_files(tmp_path: Path, name: str) -> None:
    root = make_log(5).save(tmp_path / "log")
    (root / "sub").mkdir()
    (root / "shard-000000.parquet").rename(root / name)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["shards"][0]["file"] = name
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"manifest.json: expected names of shards"):
        LoggedDataset.load(root)


def test_a_manifest_that_names_a_shard_twice(tmp_path: Path) -> None:
    root = make_log(5).save(tmp_path / "log")
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["shards"] *= 2
    manifest["rows"] = 10
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"shard-000001.parquet', got 'shard-000000.parquet"):
        LoggedDataset.load(root)


@pytest.mark.filterwarnings("ignore:.*lines hold rounds only")
def test_exports_do_not_follow_a_link_to_somewhere_else(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text("good")
    for name, save in (("x.parquet", to_parquet), ("x.jsonl", to_json_lines)):
        (tmp_path / name).symlink_to(good)
        save(make_log(5), tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert good.read_text() == "good"
