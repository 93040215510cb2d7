"""A stand-in for an index of Pinecone's service, on the loopback interface: the three requests that a bank makes.

It speaks the HTTP of the service's vector interface (JSON bodies, an Api-Key header) and searches exactly; what it
cannot show is the service's own index, limits and delays.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

KEY = "key-of-the-stand-in"


class Service(ThreadingHTTPServer):
    """Namespaces of records, and what was asked of them."""

    def __init__(self, dim: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dim = dim
        self.spaces: dict[str, dict[str, np.ndarray]] = {}
        self.asked: list[tuple[str, int]] = []
        """Path and bytes of each request."""

    @property
    def address(self) -> str:
        """For --server."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        space = self.spaces.setdefault(body.get("namespace", ""), {}) if path != "/describe_index_stats" else {}
        if path == "/vectors/upsert":
            for vector in body["vectors"]:
                if len(vector["values"]) != self.dim:
                    return 400, {"code": 3, "message": f"Vector dimension {len(vector['values'])} does not match"}
                space[vector["id"]] = np.array(vector["values"], np.float32)
            return 200, {"upsertedCount": len(body["vectors"])}
        if path == "/query":
            query = np.array(body["vector"], np.float32)
            scored = sorted(((float(vector @ query), name) for name, vector in space.items()), reverse=True)
            matches = [{"id": name, "score": score} for score, name in scored[: body["topK"]]]
            return 200, {"matches": matches, "namespace": body.get("namespace", "")}
        if path == "/describe_index_stats":
            counts = {name: {"vectorCount": len(held)} for name, held in self.spaces.items()}
            total = sum(entry["vectorCount"] for entry in counts.values())
            return 200, {"dimension": self.dim, "totalVectorCount": total, "namespaces": counts, "indexFullness": 0}
        return 404, {"code": 5, "message": f"no such path {path}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        service = self.server
        assert isinstance(service, Service)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        service.asked.append((self.path, len(raw)))
        if self.headers.get("Api-Key") != KEY:
            status, answer = 401, {"code": 16, "message": "Invalid API Key"}
        else:
            status, answer = service.answer(self.path, json.loads(raw or b"{}"))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on standard error."""


@contextmanager
def stand_in(dim: int) -> Iterator[Service]:
    """A running stand-in for an index of vectors of width `dim`."""
    service = Service(dim)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()
        thread.join()
