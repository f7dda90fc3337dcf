"""A login to a registry, as a value. Loads nothing: the common path of a build imports it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from nixops.secret import Secret
from nixops.values import RegistryName


@dataclass(frozen=True)
class Login:
    """Who we are to a registry.

    :ivar user: the user's name; ``AWS`` for ECR.
    :ivar password: the password, or a token that takes its place.
    :ivar expires: when it ends, Unix time; None: not by itself.
    :ivar identity: ``password`` is an identity token (``docker login`` at some registries leaves one): it opens no
        door itself, the registry's token server takes it for the tokens that do.
    """

    user: str
    password: Secret
    expires: float | None = None
    identity: bool = False

    def basic(self) -> Secret:
        """The value of an ``Authorization`` header of basic authentication."""
        return Secret("Basic " + self._pair(self.password.reveal()))

    def auth_file(self, registry: RegistryName) -> Secret:
        """The text of the file that ``REGISTRY_AUTH_FILE`` names (containers-auth.json(5)), for this registry alone."""
        entry: dict[str, str]
        if self.identity:
            entry = {"auth": self._pair(""), "identitytoken": self.password.reveal()}
        else:
            entry = {"auth": self._pair(self.password.reveal())}
        return Secret(json.dumps({"auths": {str(registry): entry}}))

    def _pair(self, password: str) -> str:
        return base64.b64encode(f"{self.user}:{password}".encode()).decode()
