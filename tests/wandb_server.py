"""A stand-in for the W&B server: answers what runs, artifacts, sweeps and workspaces ask, and keeps what was sent."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "project-1", "name": "frugal", "entity": {"id": "e", "name": "someone"}}
RUN = {"id": "run-1", "name": "run", "displayName": "run", "sweepName": None, "project": PROJECT, "historyLineCount": 0}
ARTIFACT = {"id": "artifact-1", "state": "PENDING", "artifactSequence": {"id": "sequence-1", "latestArtifact": None}}
VIEWER = {
    "id": "u", "entity": "someone", "username": "someone", "flags": "{}", "admin": False, "email": "s@example.org",
    "teams": {"edges": [{"node": {"name": "someone"}}]}, "apiKeys": {"edges": []},
}  # fmt: skip


@dataclass
class Received:
    """What came in."""

    url: str
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)  # of the run's history, summary and console
    files: dict[str, bytes] = field(default_factory=dict)
    vanished: bool = False  # no answer from now on

    def variables(self, operation: str) -> list[dict[str, Any]]:
        """Of every call of a GraphQL operation."""
        return [variables for name, variables in self.operations if name == operation]

    def history(self) -> list[dict[str, Any]]:
        """Rows of the run's history."""
        lines: list[str] = []
        for stream in self.streams:
            lines += stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        return [json.loads(line) for line in lines]

    def project(self) -> dict[str, Any]:
        """The project as it is read back: the runs that were sent (one, with all history), or none."""
        sent = [v.get("input", v) for v in self.variables("UpsertBucket")]
        rows = self.history()
        config = next((v["config"] for v in reversed(sent) if v.get("config")), "{}")
        summary: dict[str, Any] = {}
        for stream in self.streams:
            for line in stream.get("files", {}).get("wandb-summary.json", {}).get("content", []):
                summary |= json.loads(line)
        run = RUN | {
            "name": "run-1", "displayName": sent[0].get("displayName") if sent else None, "state": "finished",
            "user": {"name": "someone", "username": "someone"}, "config": config, "summaryMetrics": json.dumps(summary),
            "historyKeys": {"lastStep": len(rows), "keys": {}}, "history": [json.dumps(row) for row in rows],
            "parquetHistory": {"parquetUrls": [], "liveData": rows},
        }  # fmt: skip
        edges = [{"node": run, "cursor": "1"}] if sent else []
        page = {"endCursor": None, "hasNextPage": False}
        return PROJECT | {"run": run, "runCount": len(edges), "runs": {"edges": edges, "pageInfo": page}}


def answer(operation: str, variables: dict[str, Any], received: Received) -> dict[str, Any]:
    """The data of a GraphQL reply."""
    url = received.url
    if operation == "UpsertBucket":
        run = RUN | {"name": variables.get("name"), "displayName": variables.get("displayName")}
        return {"upsertBucket": {"bucket": run, "inserted": True}}
    if operation == "CreateArtifact":
        return {"createArtifact": {"artifact": ARTIFACT}}
    if operation == "CreateArtifactManifest":
        manifest = {"id": "m", "file": upload("manifest.json", url) | {"directUrl": ""}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}
    if operation == "CreateArtifactFiles":
        specs = variables["input"]["artifactFiles"] if "input" in variables else variables["artifactFiles"]
        nodes = [upload(spec["name"], url) | {"storagePath": "p", "artifact": {"id": "artifact-1"}} for spec in specs]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
    if operation == "CommitArtifact":
        return {"commitArtifact": {"artifact": {"id": "artifact-1", "digest": "d"}}}
    if operation == "CreateRunFiles":
        files = [upload(name, url) for name in variables["files"]]
        return {"createRunFiles": {"runID": "run-1", "uploadHeaders": [], "files": files}}
    if operation == "UpsertSweep":
        return {"upsertSweep": {"sweep": {"name": "sweep-1", "project": PROJECT}, "configValidationWarnings": []}}
    if operation == "UpsertView2":
        return {"upsertView": {"view": {"id": "view-1", "name": "costs"}, "inserted": True}}
    if operation in ("Runs", "RunHistoryKeys", "RunParquetHistory", "HistoryPage", "Run"):
        return {"project": received.project()}
    # What is asked before anything is sent: who is there, and whether the run exists already.
    return {
        "viewer": VIEWER,
        "model": None,
        "serverInfo": None,
        "project": PROJECT | {"artifact": None},
        "entity": {"name": "someone"},
    }


def upload(name: str, url: str) -> dict[str, Any]:
    """Where a file is to be put."""
    return {"id": name, "name": name, "displayName": name, "uploadUrl": f"{url}/upload/{name}", "uploadHeaders": []}


class Handler(BaseHTTPRequestHandler):
    received: Received
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: Any) -> None:
        if self.received.vanished:
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if not self.received.vanished:
            self.received.files[self.path.removeprefix("/upload/")] = body
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if not self.path.endswith(("graphql", "file_stream")):  # telemetry
            self._reply({})
            return
        content = json.loads(body)
        if self.received.vanished:
            self._reply({})
        elif "file_stream" in self.path:
            self.received.streams.append(content)
            self._reply({"limits": {}})
        else:
            found = re.search(r"(?:query|mutation)\s+(\w+)", content.get("query", ""))
            operation, variables = found[1] if found else "?", content.get("variables") or {}
            self.received.operations.append((operation, variables))
            self._reply({"data": answer(operation, variables, self.received)})


@contextmanager
def wandb_server() -> Iterator[Received]:
    """A server on a free port of this machine; set WANDB_BASE_URL to its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hangs up
    received = Received(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("OwnHandler", (Handler,), {"received": received})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
