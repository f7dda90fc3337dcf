"""The lab's Forgejo, and what the client asks of it, held to the runner-related paths of the real specifications.

The contracts are ``forgejo-v{9,11,15,17}.json`` in the directory that ``NIXOPS_CONTRACTS`` names, or in
``../shared/contracts`` beside the checkout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import requests

from nixops.forge.forgejo import Forgejo
from nixops.forge.smoke import Smoke
from nixops.inventory.model import Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.secret import Redactor, Secret
from nixops.values import RepoName

DIRECTORY = Path(os.environ.get("NIXOPS_CONTRACTS") or Path(__file__).parents[2].parent / "shared" / "contracts")
WANTED = (9, 11, 15, 17)
CONTRACTS = {v: DIRECTORY / f"forgejo-v{v}.json" for v in WANTED if (DIRECTORY / f"forgejo-v{v}.json").is_file()}

# Paths that every Forgejo has and that these excerpts of the specifications leave out.
BEYOND = {("GET", "/repos/search")}
# Where the server really answers otherwise than its specification says.
NULL_ARRAYS = {("ActionRunner", "labels"), ("ActionRunJob", "needs"), ("RunJobList", "")}
UNDECLARED = {401, 403, 404, 422}
ERROR = "APIError"

SCOPES = (
    Scope(repository=RepoName("torjus/nixos")),
    Scope(organization="acme"),
    Scope(user="torjus"),
    Scope(admin=True),
)
WORKFLOW = {
    "on": {"workflow_dispatch": {"inputs": {"nonce": {"required": True}}}},
    "jobs": {"build": {"runs-on": "native", "steps": [{"run": "true"}]}},
}


def is_of(value: Any, kind: str) -> bool:
    """``value`` is of a JSON type; ``true`` is no integer."""
    types: dict[str, type] = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


class Mismatch(AssertionError):
    """A value that is not of its schema."""


@dataclass(frozen=True)
class Contract:
    """One specification (Swagger 2)."""

    spec: Mapping[str, Any]

    def template(self, method: str, path: str) -> str | None:
        """The path of the specification that ``path`` is one of; literal segments win over parameters."""
        found = [
            t
            for t, operations in self.spec["paths"].items()
            if method.lower() in operations and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", t), path)
        ]
        return min(found, key=lambda t: t.count("{"), default=None)

    def operation(self, method: str, template: str) -> Mapping[str, Any]:
        operation: Mapping[str, Any] = self.spec["paths"][template][method.lower()]
        return operation

    def response(self, method: str, template: str, status: int) -> tuple[str, Mapping[str, Any]] | None:
        """Name and declaration of a response, or ``None`` where the status is not declared."""
        declared = self.operation(method, template)["responses"].get(str(status))
        if declared is not None and "$ref" in declared:
            name = declared["$ref"].rsplit("/", 1)[1]
            return name, self.spec["responses"][name]
        return None if declared is None else ("", declared)

    def check(self, value: Any, schema: Mapping[str, Any], place: str, owner: str = "", key: str = "") -> None:
        """Raise :class:`Mismatch` unless ``value`` is of ``schema``; keys the schema does not know are one too."""
        if "$ref" in schema:
            owner, key = schema["$ref"].rsplit("/", 1)[1], ""
            self.check(value, self.spec["definitions"][owner], place, owner)
            return
        kind = schema.get("type", "object")
        if value is None and kind == "array" and (owner, key) in NULL_ARRAYS:
            return
        if not is_of(value, kind):
            raise Mismatch(f"{place} is {value!r}, not of type {kind}")
        if "enum" in schema and value not in schema["enum"]:
            raise Mismatch(f"{place} is {value!r}, not one of {schema['enum']}")
        if schema.get("format") == "date-time" and not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value):
            raise Mismatch(f"{place} is {value!r}, no date-time")
        if kind == "array":
            for number, item in enumerate(value):
                self.check(item, schema["items"], f"{place}[{number}]")
        if kind == "object":
            known = schema.get("properties", {})
            rest = schema.get("additionalProperties")
            for name in schema.get("required", []):
                if name not in value:
                    raise Mismatch(f"{place} lacks {name}")
            for name, item in value.items():
                if name not in known and rest is None:
                    raise Mismatch(f"{place} has {name}, which the specification does not know")
                self.check(item, known.get(name, rest), f"{place}.{name}", owner, name)

    def check_request(self, method: str, template: str, query: Mapping[str, str], body: Any) -> None:
        """Raise unless a request gives what is required, and nothing that is not declared."""
        parameters = self.operation(method, template).get("parameters", [])
        named = {p["name"] for p in parameters if p["in"] == "path"}
        assert named == set(re.findall(r"\{(\w+)\}", template))
        declared = {p["name"]: p for p in parameters if p["in"] == "query"}
        for name in query:
            if name not in declared:
                raise Mismatch(f"{method} {template} has no parameter {name}")
        for name, parameter in declared.items():
            if parameter.get("required") and name not in query:
                raise Mismatch(f"{method} {template} needs {name}")
        for parameter in parameters:
            if parameter["in"] == "body" and body is not None:
                self.check(body, parameter["schema"], f"body of {method} {template}")

    def check_response(self, method: str, template: str, response: requests.Response) -> None:
        """Raise unless status, body and headers are as declared (or as is known of the real server)."""
        place = f"{response.status_code} of {method} {template}"
        declared = self.response(method, template, response.status_code)
        if declared is None:
            if response.status_code not in UNDECLARED:
                raise Mismatch(f"{place} is not declared")
            self.check(response.json(), {"$ref": f"#/definitions/{self._error(response)}"}, place)
            return
        name, about = declared
        if name == "RegistrationToken" and "schema" not in about:
            # Declared as a header in 9 and 11; the server sends JSON in every version.
            self.check(response.json(), {"properties": {"token": {"type": "string"}}, "required": ["token"]}, place)
        elif "schema" not in about:
            if response.content:
                raise Mismatch(f"{place} has a body")
        elif about["schema"].get("type") == "string":
            assert response.headers["Content-Type"].startswith("text/plain")
        else:
            self.check(response.json(), about["schema"], place, name)
        for header, kind in about.get("headers", {}).items():
            if header == "X-Total-Count" and not response.headers.get(header, "").isdigit():
                raise Mismatch(f"{place} has no {header}, {kind['type']}")

    @staticmethod
    def _error(response: requests.Response) -> str:
        return "APINotFound" if response.status_code == 404 else ERROR


class Caller:
    """Sends requests to the server and holds each and its answer to the contract."""

    def __init__(self, contract: Contract, url: str, token: Secret) -> None:
        self.contract = contract
        self.url = url
        self.token = token
        self.seen: set[tuple[str, str]] = set()

    def __call__(
        self, method: str, path: str, status: int, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> Any:
        headers = {"Authorization": f"token {self.token.reveal()}"}
        response = requests.request(
            method, f"{self.url}/api/v1{path}", params=query, json=body, headers=headers, timeout=10
        )
        assert response.status_code == status, f"{method} {path}: {response.status_code} {response.text}"
        if (method, path) not in BEYOND:
            template = self.contract.template(method, path)
            assert template is not None, f"{method} {path} is not in the contract"
            if status < 300:
                self.contract.check_request(method, template, query or {}, body)
            self.contract.check_response(method, template, response)
            self.seen.add((method, template))
        return response.json() if "json" in response.headers.get("Content-Type", "") else response.text


def furnished(version: int) -> ForgejoServer:
    """A server with something of everything."""
    server = ForgejoServer(version)
    server.add_user("torjus", admin=True)
    server.add_user("guest")
    server.add_org("acme", owners=["torjus"])
    for name in ("torjus/nixos", "torjus/nixos-exporter", "acme/tools"):
        server.add_repo(name)
    server.put_workflow("torjus/nixos", "smoke.yml", WORKFLOW)
    return server


def load(version: int) -> Contract:
    return Contract(json.loads(CONTRACTS[version].read_text()))


def finish_as_runner(server: ForgejoServer, token: Secret) -> None:
    """Take the waiting job and end it, over the runner's protocol."""
    made = Forgejo(server.url, token, redactor=Redactor()).create_runner(SCOPES[0], name="worker")
    headers = {"x-runner-uuid": made.uuid, "x-runner-token": made.token.reveal()}

    def rpc(method: str, body: Mapping[str, Any]) -> Any:
        url = f"{server.url}/api/actions/runner.v1.RunnerService/{method}"
        response = requests.post(url, json=body, headers=headers, timeout=10)
        assert response.status_code == 200, response.text
        return response.json()

    rpc("Declare", {"version": "v12", "labels": ["native"]})
    task = rpc("FetchTask", {"tasksVersion": "0"})["task"]
    rpc("UpdateLog", {"taskId": task["id"], "index": "0", "rows": [{"content": "hello"}], "noMore": True})
    rpc("UpdateTask", {"state": {"id": task["id"], "result": "RESULT_SUCCESS"}})


def heads() -> Iterator[str]:
    yield from ("/repos/torjus/nixos", "/orgs/acme", "/user", "/admin")


def read_everything(call: Caller, version: int) -> None:
    """The paths about who and what."""
    call("GET", "/version", 200)
    call("GET", "/user", 200)
    call("GET", "/user/orgs", 200, query={"page": "1", "limit": "10"})
    call("GET", "/user/repos", 200, query={"page": "1", "limit": "10"})
    call("GET", "/users/guest", 200)
    call("GET", "/users/torjus/repos", 200, query={"page": "1", "limit": "1"})
    call("GET", "/orgs/acme", 200)
    call("GET", "/orgs/acme/repos", 200)
    call("GET", "/repos/torjus/nixos", 200)
    for missing in ("/users/nobody", "/orgs/nobody", "/repos/torjus/absent"):
        call("GET", missing, 404)
    for head in heads():
        runners = "/admin/runners" if head == "/admin" else f"{head}/actions/runners"
        call("GET", f"{runners}/registration-token", 200)
        if version >= 11:
            call("GET", f"{runners}/jobs", 200, query={"labels": "x"})
    if version >= 15:
        call("GET", "/admin/actions/runners/registration-token", 200)
        call("GET", "/admin/actions/runners/jobs", 200)


def manage_runners(call: Caller) -> None:
    """The paths of 15 and later about runners, in every scope."""
    for head in heads():
        made = call("POST", f"{head}/actions/runners", 201, body={"name": "n", "description": "d"})
        call("POST", f"{head}/actions/runners", 422, body={"description": "no name"})
        call("GET", f"{head}/actions/runners", 200, query={"visible": "true", "page": "1", "limit": "5"})
        call("GET", f"{head}/actions/runners/{made['id']}", 200)
        call("DELETE", f"{head}/actions/runners/{made['id']}", 204)
        call("DELETE", f"{head}/actions/runners/{made['id']}", 404)


def run_workflows(call: Caller, server: ForgejoServer, version: int) -> None:
    """The paths about runs."""
    repo = "/repos/torjus/nixos"
    dispatch = f"{repo}/actions/workflows/smoke.yml/dispatches"
    call("POST", dispatch, 204, body={"ref": "master", "inputs": {"nonce": "a"}})
    call("POST", f"{repo}/actions/workflows/absent.yml/dispatches", 404, body={"ref": "master"})
    if version >= 11:
        call("GET", f"{repo}/actions/runners/jobs", 200)
        made = call("POST", dispatch, 201, body={"ref": "master", "inputs": {"nonce": "b"}, "return_run_info": True})
        assert (made["run_number"], made["jobs"]) == (2, ["build"])
    call("GET", f"{repo}/actions/tasks", 200)
    finish_as_runner(server, call.token)
    assert call("GET", f"{repo}/actions/tasks", 200)["total_count"] == 1
    if version >= 15:
        call("GET", f"{repo}/actions/runs", 200, query={"run_number": "1"})
        assert call("GET", f"{repo}/actions/runs/1", 200)["status"] == "success"
        call("GET", f"{repo}/actions/runs/99", 404)
    if version >= 17:
        (job,) = call("GET", f"{repo}/actions/runs/1/jobs", 200)
        assert call("GET", f"{repo}/actions/jobs/{job['id']}/logs", 200) == "hello\n"
        call("POST", f"{repo}/actions/runs/2/cancel", 204)


def test_the_contracts_are_there() -> None:
    """Says so when they are not: without them nothing below is held to anything."""
    missing = [f"forgejo-v{v}.json" for v in WANTED if v not in CONTRACTS]
    if len(missing) == len(WANTED):
        pytest.skip(
            f"the Forgejo contracts ({', '.join(missing)}) are not in {DIRECTORY}: "
            "put them there, or name their directory in NIXOPS_CONTRACTS"
        )
    assert not missing


def test_the_check_itself_finds_what_is_wrong() -> None:
    thing = {
        "type": "object",
        "required": ["id"],
        "properties": {
            "id": {"type": "integer"},
            "status": {"type": "string", "enum": ["idle"]},
            "labels": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "string", "format": "date-time"},
        },
    }
    contract = Contract({"definitions": {"Thing": thing}, "paths": {}, "responses": {}})
    schema = {"type": "array", "items": {"$ref": "#/definitions/Thing"}}
    contract.check([{"id": 1, "status": "idle", "labels": ["a"], "at": "2026-01-01T00:00:00Z"}], schema, "it")
    bad: list[Any] = [
        {},
        [{}],
        [{"id": "1"}],
        [{"id": True}],
        [{"id": 1, "status": "online"}],
        [{"id": 1, "labels": None}],
        [{"id": 1, "labels": [1]}],
        [{"id": 1, "other": 1}],
        [{"id": 1, "at": "yesterday"}],
        None,
    ]
    for value in bad:
        with pytest.raises(Mismatch):
            contract.check(value, schema, "it")


if CONTRACTS:

    @pytest.mark.parametrize("version", sorted(CONTRACTS))
    def test_every_path_of_the_server_is_in_its_contract_and_answers_as_declared(version: int) -> None:
        contract = load(version)
        with furnished(version) as server:
            token = server.add_token("torjus")
            call = Caller(contract, server.url, token)
            read_everything(call, version)
            if version >= 15:
                manage_runners(call)
            run_workflows(call, server, version)
            offered = {(r.method, r.template) for r in server.api.routes} - BEYOND
            assert offered == call.seen, "every path is in the contract, and was tried above"

    @pytest.mark.parametrize("version", sorted(CONTRACTS))
    def test_errors_have_the_declared_shape(version: int) -> None:
        contract = load(version)
        with furnished(version) as server:
            anonymous = Caller(contract, server.url, Secret("0" * 40))
            anonymous("GET", "/user", 401)
            narrow = Caller(contract, server.url, server.add_token("guest", ["read:repository"]))
            narrow("GET", "/user", 403)
            stranger = Caller(contract, server.url, server.add_token("guest"))
            stranger("GET", "/repos/torjus/nixos/actions/runners/registration-token", 403)
            stranger("GET", "/admin/runners/registration-token", 403)

    @pytest.mark.parametrize("version", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
    def test_the_client_asks_only_for_what_the_contract_of_the_version_declares(version: int) -> None:
        with furnished(version) as server:
            contract = load(server.contract)
            token = server.add_token("torjus")
            client = Forgejo(server.url, token, redactor=Redactor())
            for scope in SCOPES:
                client.check_access(scope)
                assert client.admitted(scope)
                made = client.create_runner(scope, name="n", description="d")
                if client.version().lists_runners:
                    assert [r.id for r in client.list_runners(scope)] == [made.id]
                    client.delete_runner(scope, made.id)
            if client.version().dispatches:
                smoke = Smoke(client, sleep=lambda _: None)
                run = smoke.dispatch(RepoName("torjus/nixos"), "smoke.yml")
                finish_as_runner(server, token)
                assert smoke.follow(run, timeout=10).ok
            for request in server.requests:
                path = request.path.removeprefix("/api/v1")
                if path.startswith("/api/actions/") or (request.method, path) in BEYOND:
                    continue
                template = contract.template(request.method, path)
                if template is None and 12 <= version < 15 and re.fullmatch(r".*/actions/runs/\d+", path):
                    # What is known of 12 to 14 differs here: tried, and a 404 is taken for "not there".
                    assert request.status == 404
                    continue
                assert template is not None, f"{request.method} {path} is not in the contract of {version}"
                query = dict(parse_qsl(request.query))
                contract.check_request(request.method, template, query, None)
