"""A W&B server on this machine: as much of its GraphQL and file-stream protocol as a run and its artifacts need.

For `bench wandb` and the tests. It keeps what it was sent and holds the sender to the protocol: lines arrive at the
offset where the last ones ended (or the same ones again at their own, when their answer was lost), and no row of
history comes under two offsets; `complaints` lists what broke that. `mood` makes it ill: it can hang, answer 500, drop
connections, or be mute: take rows of history and never say so. The real server keeps more and answers more; of the
protocol only what wandb 0.31 was seen to ask for is here, and anything else is a complaint.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mood = Literal["well", "hang", "error", "drop", "mute"]
API_KEY = "0" * 40
ENTITY, PROJECT_ID = "team", "cHJvamVjdA=="
HANG_S = 600.0


@dataclass
class Run:
    """One W&B run as the server holds it."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    """displayName, groupName, jobType, tags ... of the last upsert."""
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    """File of the stream (wandb-history.jsonl, wandb-events.jsonl ...) -> its lines."""
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order of arrival."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        """The last summary that was sent."""
        lines = self.lines.get("wandb-summary.json", [])
        return json.loads(lines[-1]) if lines else {}


@dataclass
class Artifact:
    """A version of an artifact: its content is known by its digest."""

    identity: str
    name: str
    kind: str
    digest: str
    metadata: str | None
    made_by: set[str] = field(default_factory=set)
    used_by: set[str] = field(default_factory=set)
    committed: bool = False


class Server:
    """The server, in a thread of this process; `url` says where. Use as a context manager."""

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.views: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.operations: list[str] = []
        """Names of the GraphQL operations, in the order of their arrival; 'file_stream' and 'PUT' among them."""
        self._lock = threading.Lock()
        self._closed = threading.Event()

        class Handler(_Handler):
            server_state = self

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY}

    def suffer(self) -> bool:
        """Be in the mood of the moment; False when there will be no answer."""
        if self.mood == "hang":
            self.hang()
            return False
        return self.mood != "drop"

    def hang(self) -> None:
        """Say nothing until the mood changes."""
        mood, deadline = self.mood, time.monotonic() + HANG_S
        while self.mood == mood and time.monotonic() < deadline and not self._closed.is_set():
            time.sleep(0.05)

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Take a request of the file stream."""
        with self._lock:
            self.operations.append("file_stream")
            run = self.runs.setdefault(name, Run(name))
            for file, chunk in (body.get("files") or {}).items():
                self._take(run, file, int(chunk["offset"]), chunk["content"])
            if body.get("complete"):
                run.exit_code = body.get("exitcode")

    def _take(self, run: Run, file: str, offset: int, content: list[str]) -> None:
        lines = run.lines.setdefault(file, [])
        if file == "wandb-summary.json":
            lines[:] = content
            return
        before = lines[offset : offset + len(content)]
        if offset > len(lines) or before != content[: len(before)]:
            self.complaints.append(f"{run.name}: {file} at offset {offset}, but there are {len(lines)} lines")
        lines[offset : offset + len(content)] = content
        if file == "wandb-history.jsonl":
            steps = [row["_step"] for row in run.history]
            self.complaints += [f"{run.name}: step {step} came twice" for step in {*steps} if steps.count(step) > 1]

    def _GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "dXNlcg==", "entity": ENTITY}}

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.views.append(variables)
        view = {"id": variables.get("id") or f"view-{len(self.views)}", "name": variables["name"]}
        return {"upsertView": {"view": view, "inserted": "id" not in variables}}

    def answer(self, operation: str, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Data of a GraphQL operation, None for one that is not known."""
        with self._lock:
            self.operations.append(operation)
            known: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, f"_{operation}", None)
            if known is None:
                self.complaints.append(f"unknown operation {operation}: {' '.join(query.split())[:2000]} {variables}")
                return None
            return known(variables)

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "dXNlcg==", "entity": ENTITY, "username": ENTITY, "email": None, "admin": False,
                           "flags": "{}", "teams": {"edges": [{"node": {"name": ENTITY}}]}}}  # fmt: skip

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        is_new = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], Run(variables["name"]))
        run.fields |= {key: value for key, value in variables.items() if value is not None and key != "config"}
        if variables.get("config"):
            run.config = {key: item["value"] for key, item in json.loads(variables["config"]).items()}
        project = {"name": variables.get("project") or "p", "entity": {"name": ENTITY}, "id": PROJECT_ID}
        bucket = {"id": f"id-{run.name}", "name": run.name, "displayName": run.fields.get("displayName"),
                  "config": "{}", "sweepName": None, "project": project,
                  "historyLineCount": len(run.history)}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        model: dict[str, Any] = {"id": PROJECT_ID, "name": variables.get("project"), "entity": {"name": ENTITY}}
        if run is None:
            return {"model": {**model, "bucket": None}}
        lines = {name: run.lines.get(f"wandb-{name}.jsonl", []) for name in ("history", "events")}
        config = {key: {"value": value} for key, value in run.config.items()}
        bucket: dict[str, Any] = {
            "id": f"id-{run.name}", "name": run.name, "summaryMetrics": json.dumps(run.summary), "tags": [],
            "displayName": run.fields.get("displayName"), "logLineCount": len(run.lines.get("output.log", [])),
            "historyLineCount": len(lines["history"]), "eventsLineCount": len(lines["events"]),
            "historyTail": json.dumps(lines["history"][-1:]), "eventsTail": json.dumps(lines["events"][-1:]),
            "config": json.dumps(config), "wandbConfig": json.dumps({"t": 1}), "state": "crashed",
        }  # fmt: skip
        return {"model": {**model, "bucket": bucket}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        name, digest = wanted["artifactCollectionName"], wanted["digest"]
        found = next((a for a in self.artifacts if (a.name, a.digest) == (name, digest)), None)
        if found is None:
            found = Artifact(f"artifact-{len(self.artifacts)}", name, wanted["artifactTypeName"], digest,
                             wanted.get("metadata"))  # fmt: skip
            self.artifacts.append(found)
        if wanted.get("runName"):
            found.made_by.add(wanted["runName"])
        return {"createArtifact": {"artifact": {
            "id": found.identity, "state": "COMMITTED" if found.committed else "PENDING",
            "artifactSequence": {"id": name, "latestArtifact": None},
        }}}  # fmt: skip

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"].split(":")[0]
        kind = next((artifact.kind for artifact in self.artifacts if artifact.name == name), None)
        return {"project": {"artifact": kind and {"artifactType": {"name": kind}}}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "file", "name": "wandb_manifest.json", "displayName": "manifest",
                "uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{variables['artifactID']}",
                                                                "file": file}}}  # fmt: skip

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": {"id": f"file-{spec['name']}", "name": spec["name"], "displayName": spec["name"],
                      "uploadUrl": f"{self.url}/put/{spec['name']}", "uploadHeaders": [], "storagePath": "x",
                      "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}}
            for spec in variables["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self._artifact(variables["artifactID"]).committed = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "x"}}}

    def _UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables.get("input", variables)
        self._artifact(wanted["artifactID"]).used_by.add(wanted["runName"])
        return {"useArtifact": {"artifact": {"id": wanted["artifactID"], "digest": "x", "description": None,
                                             "state": "COMMITTED", "createdAt": "", "metadata": "{}"}}}  # fmt: skip

    def _ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = self._artifact(variables["id"])
        project = {"name": "p", "entity": {"name": ENTITY}, "id": PROJECT_ID, "internalId": PROJECT_ID}
        return {"artifact": {
            "__typename": "Artifact", "id": found.identity, "versionIndex": 0, "artifactType": {"name": found.kind},
            "artifactSequence": {"__typename": "ArtifactSequence", "name": found.name, "project": project},
            "description": None, "metadata": found.metadata, "ttlDurationSeconds": -2, "ttlIsInherited": True,
            "tags": [], "historyStep": None, "state": "COMMITTED", "size": 0, "digest": found.digest,
            "commitHash": None, "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "aliases": [],
        }}  # fmt: skip

    def _artifact(self, identity: str) -> Artifact:
        return next(artifact for artifact in self.artifacts if artifact.identity == identity)


class _Http(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        state = self.server_state
        if not state.suffer():
            self.close_connection = True
            return
        if state.mood == "error":
            return self._send({"error": "out of order"}, 500)
        if self.path.endswith("/file_stream"):
            streamed = json.loads(body)
            state.stream(self.path.split("/")[-2], streamed)
            if state.mood == "mute" and "wandb-history.jsonl" in streamed.get("files", {}):
                state.hang()
                self.close_connection = True
                return
            return self._send({"exitcode": None, "limits": {}})
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            operation = asked.get("operationName") or _named(asked["query"])
            data = state.answer(operation, asked["query"], asked.get("variables") or {})
            if data is None:
                return self._send({"data": None, "errors": [{"message": f"unknown {operation}"}]})
            return self._send({"data": data})
        return self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server_state.operations.append("PUT")
        self._send({})

    def do_GET(self) -> None:
        if not self.server_state.suffer():
            self.close_connection = True
            return
        self._send({}, 500 if self.server_state.mood == "error" else 200)

    def _send(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def _named(query: str) -> str:
    """Name of the operation a query begins with."""
    words = query.replace("(", " ").replace("{", " ").split()
    return words[1] if len(words) > 1 else ""
