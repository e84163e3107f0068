"""A W&B server of one process on 127.0.0.1, as far as ``wandb sweep``, ``wandb agent``, runs and ``wandb sync`` ask.

It answers GraphQL by the operation's main field, hands out a grid's combinations to agents, and keeps what runs send:
configuration, history rows and exit code. Nothing is stored on disk, uploads are taken and forgotten.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, PROJECT = "tests", "vitscope"


def _values(node: dict[str, Any]) -> list[Any]:
    """Return a parameter's values; of a range its ends."""
    if "values" in node:
        return node["values"]
    return [node["value"]] if "value" in node else [node["min"], node["max"]]


def _key(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


@dataclass
class ServerRun:
    """What the server knows of a run."""

    name: str
    sweep: str | None = None
    group: str | None = None
    job_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    seen: bool = False


@dataclass
class ServerSweep:
    """A sweep and the trials it has not handed out."""

    name: str
    text: str
    waiting: Iterator[dict[str, Any]]
    state: str = "RUNNING"


class Server(ThreadingHTTPServer):
    """The stand-in; ``environment`` is what a client needs to find it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.runs: dict[str, ServerRun] = {}
        self.sweeps: dict[str, ServerSweep] = {}
        self.agents: dict[str, str] = {}
        self.unknown: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.connections: list[socket.socket] = []

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which W&B's clients talk to this server and to no other."""
        return {
            "WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT,
            "WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_STATS": "true",
        }  # fmt: skip

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember the connection: a client keeps it, and would be answered after the server is gone."""
        accepted = super().get_request()
        self.connections.append(accepted[0])
        return accepted

    def vanish(self) -> None:
        """Go away in the middle, connections and all."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet: clients cut idle connections when they end."""

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL operation; an unknown one is noted and gets nothing."""
        with self.lock:
            for pattern, method in _FIELDS:
                if re.search(pattern, query):
                    return method(self, given)
            self.unknown.append(query.strip()[:200])
            return {}

    def _upsert_sweep(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        content = yaml.safe_load(given["config"])
        lists = {key: _values(node) for key, node in content["parameters"].items()}
        trials = (dict(zip(lists, chosen)) for chosen in itertools.product(*lists.values()))
        self.sweeps[name] = ServerSweep(name, given["config"], trials)
        return {"upsertSweep": {"sweep": self._sweep_node(name), "configValidationWarnings": []}}

    def _sweep(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("sweep") or given.get("name") or ""
        node = {**self._sweep_node(name), "runs": {"edges": []}} if name in self.sweeps else None
        return {"project": {"id": _key("Project", PROJECT), "name": PROJECT, "sweep": node}}

    def _sweep_node(self, name: str) -> dict[str, Any]:
        sweep = self.sweeps[name]
        project = {
            "id": _key("Project", PROJECT),
            "name": PROJECT,
            "entity": {"id": _key("Entity", ENTITY), "name": ENTITY},
        }
        return {
            "id": _key("Sweep", name), "name": name, "displayName": None, "method": "grid", "state": sweep.state,
            "description": "", "config": sweep.text, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None,
            "updatedAt": None, "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None,
            "runCount": 0, "runCountExpected": None, "project": project,
        }  # fmt: skip

    def _create_agent(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"agent{len(self.agents)}"
        self.agents[_key("Agent", name)] = given["sweep"]
        return {"createAgent": {"agent": {"id": _key("Agent", name), "name": name, "state": "running"}}}

    def _heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[self.agents[given["id"]]]
        commands: list[dict[str, Any]] = []
        if not json.loads(given.get("runState") or "{}"):
            trial = next(sweep.waiting, None)
            if trial is None:
                sweep.state, commands = "FINISHED", [{"type": "exit"}]
            else:
                name = f"run{len(self.runs)}"
                self.runs[name] = ServerRun(name, sweep.name)
                arguments = {key: {"value": value} for key, value in trial.items()}
                commands = [{"type": "run", "run_id": name, "program": "train.py", "args": arguments}]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _upsert_run(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(given["name"], ServerRun(given["name"]))
        inserted, run.seen = not run.seen, True
        run.group = given.get("groupName") or run.group
        run.job_type = given.get("jobType") or run.job_type
        if given.get("config"):
            run.config = {
                key: node.get("value") for key, node in json.loads(given["config"]).items() if key != "_wandb"
            }
        return {"upsertBucket": {"bucket": self._run_node(run), "inserted": inserted}}

    def _run_node(self, run: ServerRun) -> dict[str, Any]:
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        project = {
            "id": _key("Project", PROJECT),
            "name": PROJECT,
            "entity": {"id": _key("Entity", ENTITY), "name": ENTITY},
        }
        return {
            "id": _key("Run", run.name), "name": run.name, "displayName": run.name, "description": None, "config": config,
            "sweepName": run.sweep, "project": project, "historyLineCount": len(run.history), "files": {"edges": []},
        }  # fmt: skip

    def _resumed(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given.get("name", ""))
        bucket = None
        if run is not None and run.seen:
            tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
            bucket = {
                **self._run_node(run), "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "eventsLineCount": 0,
                "historyTail": tail, "eventsTail": "[]", "tags": [], "notes": None, "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        entity = {"id": _key("Entity", ENTITY), "name": ENTITY}
        return {"model": {"id": _key("Project", PROJECT), "name": PROJECT, "entity": entity, "bucket": bucket}}

    def _files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
        return {"createRunFiles": {"runID": _key("Run", given["run"]), "uploadHeaders": [], "files": files}}

    def _viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "t@localhost", "admin": False}
        return {"viewer": {**user, "flags": "{}", "apiKeys": {"edges": []}, "teams": {"edges": []}}}

    def _info(self, given: dict[str, Any]) -> dict[str, Any]:
        local = {"outOfDate": False, "latestVersionString": "0.99.0", "versionOnThisInstanceString": "0.99.0"}
        bounds = {"max_cli_version": "0.99.0", "min_cli_version": "0.1.0"}
        return {"serverInfo": {"features": [], "cliVersionInfo": bounds, "latestLocalVersionInfo": local}}

    def _upsert_view(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keep a report or a saved workspace."""
        self.views.append({**given, "spec": json.loads(given["spec"])})
        project = {"id": _key("Project", PROJECT), "name": given["projectName"], "entityName": given["entityName"]}
        view = {
            "id": _key("View", str(len(self.views))), "type": given["type"], "name": given["name"],
            "displayName": given["displayName"], "description": given["description"], "project": project, "spec": given["spec"],
            "updatedAt": "2026-01-01T00:00:00",
        }  # fmt: skip
        return {"upsertView": {"view": view, "inserted": True}}

    def _project(self, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==", "id": _key("Project", PROJECT), "name": PROJECT}
        }

    def _projects(self, given: dict[str, Any]) -> dict[str, Any]:
        node = {"id": _key("Project", PROJECT), "name": PROJECT, "entityName": ENTITY, "createdAt": "2026-01-01T00:00:00",
                "isBenchmark": False, "user": None}  # fmt: skip
        return {
            "models": {"edges": [{"node": node, "cursor": "a"}], "pageInfo": {"endCursor": None, "hasNextPage": False}}
        }

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Keep rows and the exit code that a run streams."""
        with self.lock:
            run = self.runs.setdefault(name, ServerRun(name))
            files = sent.get("files") or {}
            run.history += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
            for line in files.get("wandb-summary.json", {}).get("content", []):
                run.summary.update(json.loads(line))
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode")


#: a pattern of the query, in the order in which they are tried, and who answers
_FIELDS = (
    ("upsertView", Server._upsert_view),
    ("upsertSweep", Server._upsert_sweep), ("createAgent", Server._create_agent), ("agentHeartbeat", Server._heartbeat),
    ("upsertBucket", Server._upsert_run), ("createRunFiles", Server._files), (r"\bsweep\(", Server._sweep),
    ("missingOk", Server._resumed), (r"\bviewer\b", Server._viewer), ("features|serverInfo", Server._info),
    (r"\bstopped\b", lambda server, given: {"project": {"run": {"stopped": False}}}),
    ("internalId", Server._project), (r"\bmodels\(", Server._projects),
)  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            self._reply({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
            return
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.stream(found[1], json.loads(body or b"{}"))
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
