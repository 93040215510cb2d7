"""A bank's index in Milvus: Lite, embedded, in the bank's folder, or a server for banks that outgrow one machine.

Milvus Lite lets one process at a time open a bank (a lock of its own). A server's address is kept in the bank's
manifest; a token for it is read from the environment variable MILVUS_TOKEN, and so never written anywhere.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.backends import Source, best_of, import_extra
from megacm3.retrieval.index import VectorIndex, choose_index, default_nprobe, inverted_lists, new_index

_FOLDER = "milvus.db"
_QUERIES = 1024
"""Queries of a request: a request holds 64 MB at most."""
_KINDS = ("FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW")
_EXACT_BELOW = 10_000


def load() -> ModuleType:
    """The package."""
    return import_extra("pymilvus", "milvus")


def build(folder: Path, source: Source, kind: str, server: str) -> dict[str, Any]:
    """Make a collection and put all vectors in. `kind`: FLAT, IVF_FLAT, IVF_SQ8 or HNSW; auto: FLAT, from 10,000
    documents IVF_FLAT."""
    kind = ("FLAT" if len(source) < _EXACT_BELOW else "IVF_FLAT") if kind == "auto" else kind
    if kind not in _KINDS:
        raise ConfigError(f"--index {kind}; expected one of {', '.join(_KINDS)} with --backend milvus")
    if not server:
        load_lite()
        shutil.rmtree(folder / "index" / _FOLDER, ignore_errors=True)
        (folder / "index").mkdir(parents=True, exist_ok=True)
    lists = _lists(len(source), source.dim) if kind.startswith("IVF") else 0
    made = {"server": server, "collection": source.name, "milvus_index": kind, "lists": lists}
    with _client(folder, made) as client:
        _create(client, source, made)
        for ids, vectors in source.blocks(1024):
            rows = [{"id": int(number), "vector": vector} for number, vector in zip(ids, vectors, strict=True)]
            client.upsert(source.name, rows)
        client.flush(source.name)
        client.load_collection(source.name)
    return made | {"index": f"milvus {kind}", "index_files": []}


def _lists(documents: int, dim: int) -> int:
    listed = inverted_lists(new_index(choose_index(documents), dim))
    return int(listed.nlist) if listed is not None else 1


def _create(client: Any, source: Source, made: dict[str, Any]) -> None:
    if client.has_collection(source.name):
        client.drop_collection(source.name)
    types = load().DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", types.INT64, is_primary=True)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=source.dim)
    parameters = client.prepare_index_params()
    tuned = {"nlist": made["lists"]} if made["lists"] else {}
    if made["milvus_index"] == "HNSW":
        tuned = {"M": 32, "efConstruction": 200}
    parameters.add_index("vector", index_type=made["milvus_index"], metric_type="IP", **tuned)
    client.create_collection(source.name, schema=schema, index_params=parameters)


def load_lite() -> ModuleType:
    """The embedded Milvus."""
    return import_extra("milvus_lite", "milvus")


@contextmanager
def _client(folder: Path, settings: dict[str, Any]) -> Iterator[Any]:
    client = _connect(folder, settings)
    try:
        yield client
    finally:
        client.close()
        if not settings["server"]:
            _release(folder)


def _connect(folder: Path, settings: dict[str, Any]) -> Any:
    milvus, server = load(), settings["server"]
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)
    if not server:
        load_lite()
    try:
        if server:
            return milvus.MilvusClient(server, token=os.environ.get("MILVUS_TOKEN", ""))
        return milvus.MilvusClient(str((folder / "index" / _FOLDER).resolve()))
    except milvus.MilvusException as fault:
        where = server or f"{folder}/index/{_FOLDER}"
        hint = "is it running?" if server else "another process may hold it: Milvus Lite lets one open a bank at a time"
        raise DataError(f"Milvus at {where} cannot be opened ({hint}): {fault}") from fault


def _release(folder: Path) -> None:
    # Closing a client leaves the embedded server running, and its lock in the way of the folder's new name.
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(str((folder / "index" / _FOLDER).resolve()))


def open_index(folder: Path, settings: dict[str, Any]) -> VectorIndex:
    """The collection of a bank. Raises DataError when it is not there, or of another size or width."""
    server = settings["server"]
    place = server or f"{folder}/index/{_FOLDER}"
    if not server and not (folder / "index" / _FOLDER).is_dir():
        raise DataError(f"{place} is missing")
    client, name = _connect(folder, settings), settings["collection"]
    try:
        if not client.has_collection(name):
            raise DataError(f"Milvus at {place} has no collection {name}; build the bank again")
        client.load_collection(name)
        fields = {field["name"]: field for field in client.describe_collection(name)["fields"]}
        dim = int(fields["vector"]["params"]["dim"])
        count = int(client.query(name, output_fields=["count(*)"])[0]["count(*)"])
    except load().MilvusException as fault:
        raise DataError(f"Milvus at {place}: {fault}") from fault
    return MilvusCollection(client, settings, dim, count, None if server else folder)


class MilvusCollection:
    """An opened collection."""

    def __init__(self, client: Any, settings: dict[str, Any], dim: int, size: int, folder: Path | None) -> None:
        """`folder`: of a bank in Milvus Lite."""
        self._client, self._name, self._folder = client, settings["collection"], folder
        self.dim, self.size = dim, size
        lists = int(settings["lists"])
        self._tuned: dict[str, int] = {"nprobe": default_nprobe(lists)} if lists else {}
        self._hnsw = settings["milvus_index"] == "HNSW"

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`."""
        queries = np.ascontiguousarray(queries, np.float32)
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        tuned = {"ef": max(64, 2 * k)} if self._hnsw else self._tuned
        numbers = [] if exclude is None else np.asarray(exclude, np.int64).tolist()
        given: dict[str, Any] = {"limit": k, "search_params": {"metric_type": "IP", "params": tuned}}
        if numbers:
            given["filter"] = f"id not in {numbers}"
        for start in range(0, len(queries), _QUERIES):
            block = list(queries[start : start + _QUERIES])
            try:
                found = self._client.search(self._name, block, output_fields=["id"], **given)
            except load().MilvusException as fault:
                raise DataError(f"Milvus refused a search of {self._name}: {fault}") from fault
            for n, hits in enumerate(found):
                near = np.array([hit["distance"] for hit in hits], np.float32)
                numbers_of = np.array([hit["id"] for hit in hits], np.int64)
                scores[start + n], ids[start + n] = best_of(near, numbers_of, k, None)
        return scores, ids

    def close(self) -> None:
        """Let others open the bank."""
        self._client.close()
        if self._folder is not None:
            _release(self._folder)
