"""One task's clients, made from the inventory when they are first used and closed at its end."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nixops.errors import UsageError
from nixops.inventory.load import Loaded
from nixops.inventory.model import Config, Host, SecretRef
from nixops.nix.verbs import Nix
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.transport.openssh import OpenSshFiles
from nixops.transport.target import SshTarget
from nixops.values import HostName
from nixops.vault.refs import resolve_ref, secret_variables
from nixops.vault.settings import BaoSettings, settings_from

if TYPE_CHECKING:  # paramiko, requests and hvac are only loaded by those who use them
    from nixops.forge.forgejo import Forgejo
    from nixops.transport.ssh import SshRunner
    from nixops.vault.approle import HostRoles
    from nixops.vault.openbao import OpenBao


class Session:
    """Everything a task reaches the world through.

    :param loaded: the inventory; relative paths in it are relative to its file.
    :param environ: the operator's environment, the one place it is read from.
    """

    def __init__(self, loaded: Loaded, redactor: Redactor, environ: Mapping[str, str]) -> None:
        self.loaded = loaded
        self.redactor = redactor
        self.environ = environ
        self.base = loaded.base
        # git, nix and ssh work for minutes, and need none of the operator's tokens.
        self.local = LocalRunner(without=secret_variables(loaded.inventory))
        self._open: list[SshRunner] = []
        # Reentrant: a login may need a secret that is kept in OpenBao.
        self._making = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for runner in self._open:
            runner.close()

    def resolve(self, ref: SecretRef) -> Secret:
        """The secret that a reference of the inventory names; known to the redactor from here on."""
        return resolve_ref(
            ref,
            environ=self.environ,
            base=self.base,
            # A password manager that the inventory names is the operator's own program: it may need the tokens.
            local=LocalRunner(),
            redactor=self.redactor,
            openbao=self.bao,
        )

    def target(self, name: HostName, host: Host) -> SshTarget:
        """How to connect to a host."""
        return SshTarget.from_inventory(name, host, self.base)

    def connect(self, name: HostName, host: Host) -> SshRunner:
        """A connection of its own to a host; opened when it is first used, closed with the session."""
        from nixops.transport.ssh import SshRunner

        password = host.sudo_password
        runner = SshRunner(
            self.target(name, host),
            sudo_password=(lambda: self.resolve(password)) if password else None,
            redactor=self.redactor,
        )
        self._open.append(runner)
        return runner

    @functools.cached_property
    def config(self) -> Config:
        """The user's flake.

        :raises UsageError: the inventory names none, or it is not there.
        """
        config = self.loaded.inventory.config
        if config is None:
            raise UsageError(
                f"{self.loaded.file} has no `config`", hint="say where the flake is: config: {flake: ../nixos-servers}"
            )
        return config

    @functools.cached_property
    def checkout(self) -> Path:
        """The directory of the user's flake, absolute."""
        root = (self.base / Path(self.config.flake).expanduser()).resolve()
        if not (root / "flake.nix").is_file():
            raise UsageError(
                f"{self.loaded.file}: config.flake: there is no flake.nix in {root}",
                hint="the path is relative to the inventory file",
            )
        return root

    def forge(self) -> Forgejo:
        """The Forgejo of the inventory; its version is asked once."""
        with self._making:
            return self._forge

    @functools.cached_property
    def _forge(self) -> Forgejo:
        from nixops.forge.forgejo import Forgejo

        forge = self.loaded.inventory.forge
        if forge is None:
            raise UsageError(f"{self.loaded.file} has no `forge`", hint="say which: forge: {url: …, token: {env: …}}")
        return Forgejo(
            forge.url,
            self.resolve(forge.token),
            redactor=self.redactor,
            ca_file=(self.base / forge.ca_file) if forge.ca_file else None,
            timeout=forge.timeout,
        )

    @functools.cached_property
    def bao_settings(self) -> BaoSettings:
        """Where OpenBao is and how to log in: the inventory, then ``BAO_*``, then ``VAULT_*``."""
        return settings_from(self.loaded.inventory.vault, self.environ, self.resolve, self.base)

    def bao(self) -> OpenBao:
        """The OpenBao of the inventory; one login, whoever of the threads needs it first."""
        with self._making:
            return self._bao

    @functools.cached_property
    def _bao(self) -> OpenBao:
        from nixops.vault.openbao import OpenBao

        return OpenBao(self.bao_settings, self.redactor)

    def roles(self) -> HostRoles:
        """The hosts' AppRoles and policies."""
        from nixops.vault.approle import HostRoles

        vault = self.loaded.inventory.vault
        return HostRoles(self.bao(), mount=vault.host_approle_mount, prefix=vault.role_prefix)

    def nix(self, ssh: OpenSshFiles | None = None) -> Nix:
        """Nix here; with ``ssh``, one that reaches stores over SSH with our keys and our trust."""
        return Nix(self.local, env=ssh.nix_env() if ssh else {})
