"""Where on the forge a scope is: its paths, its page, and what a token needs there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from nixops.inventory.model import Scope


@dataclass(frozen=True)
class Place:
    """A scope as the API and the web interface see it.

    :ivar path: the head of its API paths.
    :ivar category: of the token scopes it takes.
    :ivar role: who may do it.
    :ivar page: where in the web interface its runners are.
    """

    path: str
    category: str
    role: str
    page: str

    @property
    def runners(self) -> str:
        """The path of its runners."""
        return f"{self.path}/actions/runners"

    def needs(self, access: str) -> str:
        """What a call takes, for an error's hint; ``access`` is ``read`` or ``write``."""
        return f"a token with the scope {access}:{self.category}, of {self.role}"


def place_of(scope: Scope) -> Place:
    """The place of a scope. There is none for "these three repositories"."""
    if scope.repository is not None:
        name = scope.repository
        return Place(
            f"/repos/{quote(name.owner, safe='')}/{quote(name.repo, safe='')}",
            "repository",
            f"an owner or administrator of {name}",
            f"/{name}/settings/actions/runners",
        )
    if scope.organization is not None:
        org = quote(scope.organization, safe="")
        return Place(
            f"/orgs/{org}", "organization", f"an owner of {scope.organization}", f"/org/{org}/settings/actions/runners"
        )
    if scope.user is not None:
        return Place("/user", "user", f"{scope.user} (the account itself)", "/user/settings/actions/runners")
    return Place("/admin", "admin", "a site administrator", "/admin/actions/runners")
