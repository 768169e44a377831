"""A small W&B server on this machine: `wandb sync`, W&B's own reader of offline runs, sends it what a run holds.

It answers as W&B does where an artifact of the same content is known already, so that files of artifacts are never asked for.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

KEY = "5ec7e7" * 7  # the API key, which must not be in anything that is sent


class SyncedRun:
    """What the server was sent of one run."""

    def __init__(self) -> None:
        self.about: dict = {}  # displayName, groupName, jobType, tags, notes
        self.config: dict = {}
        self.history: list[dict] = []
        self.made: dict[str, dict] = {}  # artifacts by name: type, metadata, digest
        self.used: dict[str, dict] = {}
        self.files: set[str] = set()


class WandbServer:
    """The runs that were synced, by their ids, and everything that was sent, as text."""

    def __init__(self) -> None:
        self.runs: dict[str, SyncedRun] = {}
        self.sent: list[str] = []
        self._artifacts: dict[str, dict] = {}

    def answer(self, path: str, body: str) -> dict:
        """The answer to a request."""
        self.sent.append(body)
        if path.endswith("/file_stream"):
            chunks = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            self._run(path.split("/")[-2]).history += map(json.loads, chunks["content"])
            return {}
        request = json.loads(body) if path == "/graphql" else {}
        answer = getattr(self, request.get("operationName", ""), None)
        return {"data": answer(request["variables"]) if answer else {}}

    def _run(self, name: str) -> SyncedRun:
        return self.runs.setdefault(name, SyncedRun())

    def UpsertBucket(self, given: dict) -> dict:  # noqa: N802
        """A run starts, or its config changes."""
        run = self._run(given["name"])
        run.about |= {name: given[name] for name in ("displayName", "groupName", "jobType", "tags", "notes") if given[name]}
        run.config |= {name: item["value"] for name, item in json.loads(given["config"] or "{}").items()}
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": given["entity"] or "me"}}
        bucket = {"id": "r", "name": given["name"], "displayName": "", "project": project, "historyLineCount": 0, "config": "{}"}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def CreateArtifact(self, given: dict) -> dict:  # noqa: N802
        """A version of an artifact: of a run that made it, or, without a run, one that is going to be used."""
        given = given["input"]
        found = {"type": given["artifactTypeName"], "metadata": json.loads(given["metadata"] or "{}"), "digest": given["digest"]}
        self._artifacts[given["clientID"]] = {given["artifactCollectionName"]: found}
        if given["runName"]:
            self._run(given["runName"]).made |= self._artifacts[given["clientID"]]
        artifact = {"id": given["clientID"], "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": given["clientID"]}}}
        return {"createArtifact": {"artifact": artifact}}

    def UseArtifact(self, given: dict) -> dict:  # noqa: N802
        """A run uses an artifact."""
        given = given.get("input", given)
        self._run(given["runName"]).used |= self._artifacts[given["artifactID"]]
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def CreateRunFiles(self, given: dict) -> dict:  # noqa: N802
        """A run has files."""
        self._run(given["run"]).files |= set(given["files"])
        files = [{"name": name, "uploadUrl": f"{self.address}/upload/{number}"} for number, name in enumerate(given["files"])]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server for the time of the context."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            data = json.dumps(state.answer(self.path, body.decode(errors="replace"))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *given) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def synced(folders: Sequence[Path]) -> WandbServer:
    """What W&B's own program `wandb sync` sends of the offline runs in run folders."""
    runs = [str(run) for folder in folders for run in sorted(folder.glob("wandb/offline-run-*"))]
    assert len(runs) >= len(folders)
    with wandb_server() as server:
        there = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY[:40], "WANDB_ERROR_REPORTING": "false"}
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *runs], env=os.environ | there, capture_output=True, text=True, timeout=90
        )
    assert done.returncode == 0, done.stderr
    return server
