"""What Forgejo's API answers, as far as it is used: unknown keys are ignored, a missing one is a clear error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from nixops.forge.http import BadAnswer
from nixops.secret import Secret
from nixops.values import RepoName


@dataclass(frozen=True)
class RunnerCredentials:
    """What a runner logs in with. ``id`` is what the API knows it by."""

    id: int
    uuid: str
    token: Secret


@dataclass(frozen=True)
class RunnerInfo:
    """A registered runner.

    :ivar status: ``offline`` (no contact for 60 s, or never), ``idle`` or ``active``.
    :ivar labels: names without their schema; empty until the daemon has declared them.
    """

    id: int
    uuid: str
    name: str
    status: str
    labels: tuple[str, ...]
    description: str = ""
    version: str = ""


class Shape(BaseModel):
    """Lenient about what is there besides, strict about what is needed."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)


class VersionShape(Shape):
    version: str


class UserShape(Shape):
    login: str
    is_admin: bool = False


class OrganizationShape(Shape):
    id: int
    name: str | None = None
    username: str | None = None

    @property
    def names(self) -> set[str]:
        """Its name in lower case; older versions give ``username`` only."""
        return {n.lower() for n in (self.name, self.username) if n}


class PermissionShape(Shape):
    admin: bool = False


class RepositoryShape(Shape):
    id: int
    full_name: str
    permissions: PermissionShape | None = None
    has_actions: bool | None = None
    default_branch: str = ""

    def repo_name(self) -> RepoName:
        """:raises BadAnswer: the server gave a name that no repository has."""
        try:
            return RepoName(self.full_name)
        except ValueError as error:
            raise BadAnswer(f"the forge lists a repository under a name that none has: {error}") from None


class SearchShape(Shape):
    data: list[RepositoryShape]


class TokenShape(Shape):
    token: Annotated[str, Field(min_length=8)]


class CreatedRunnerShape(Shape):
    id: int
    uuid: Annotated[str, Field(min_length=8)]
    token: Annotated[str, Field(min_length=8)]


class RegisteredRunnerShape(Shape):
    """``Register`` of the runner's protocol: protobuf's JSON, whose 64-bit numbers are strings."""

    runner: CreatedRunnerShape


def _null_is_empty(value: Any) -> Any:
    # Labels are null until the daemon has declared them; empty job lists come as null too.
    return [] if value is None else value


Labels = Annotated[list[str], BeforeValidator(_null_is_empty)]


class RunnerShape(Shape):
    id: int
    uuid: str
    name: str
    status: str
    labels: Labels = []
    description: str = ""
    version: str = ""

    def info(self) -> RunnerInfo:
        """As the value that is handed out."""
        return RunnerInfo(
            self.id, self.uuid, self.name, self.status, tuple(self.labels), self.description, self.version
        )


class DispatchedShape(Shape):
    id: int
    run_number: int = 0
    jobs: Labels = []


class RunShape(Shape):
    id: int
    status: str
    title: str = ""
    html_url: str = ""
    index_in_repo: int = 0


class TaskShape(Shape):
    id: int
    status: str
    run_number: int
    workflow_id: str
    event: str = ""
    display_title: str = ""
    url: str = ""


class TasksShape(Shape):
    workflow_runs: Annotated[list[TaskShape], BeforeValidator(_null_is_empty)] = []


class JobShape(Shape):
    id: int
    name: str
    status: str


def read(shape: Any, value: Any, what: str) -> Any:
    """``value`` validated as ``shape``.

    :param what: the request, for the error.
    :raises BadAnswer: with the place and the kind of what is wrong, and never the value, which may be a secret.
    """
    try:
        return TypeAdapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"]) or "the answer"
        raise BadAnswer(
            f"{what} was answered with JSON of another shape: {place}: {first['msg']}",
            hint="is forge.url a Forgejo, and one of a supported version?",
        ) from None
