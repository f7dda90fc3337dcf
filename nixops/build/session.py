"""One build's clients, made from the inventory when they are first used and closed at its end.

Nothing heavy is loaded here: boto3, hvac and requests come in with the first use of what needs them, and a build that
does not push needs none of them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nixops.build.claims import Claims
from nixops.build.model import PoolBuilder
from nixops.build.pool import Pool, pool_of
from nixops.build.quarantine import Quarantine
from nixops.errors import NixopsError
from nixops.inventory.building import Registry
from nixops.inventory.load import Loaded
from nixops.inventory.model import SecretRef
from nixops.nix.verbs import Nix
from nixops.secret import Redactor, Secret
from nixops.state import state_directory
from nixops.transport.local import LocalRunner
from nixops.transport.mux import SshPool
from nixops.values import RegistryName
from nixops.vault.files import expanded
from nixops.vault.refs import resolve_ref, secret_variables
from nixops.vault.store import builders_key

if TYPE_CHECKING:  # requests and hvac are only loaded by those who use them
    from nixops.registry.client import RegistryClient
    from nixops.registry.login import Login
    from nixops.vault.openbao import OpenBao


class BuildSession:
    """Everything a build reaches the world through.

    :param loaded: the inventory; relative paths in it are relative to its file.
    :param environ: the operator's environment, the one place it is read from.
    :param machines: a file in Nix's machines format, in place of ``build.machines``.
    :param say: is told, in a line, what does not keep the build from going on.
    """

    def __init__(
        self,
        loaded: Loaded,
        redactor: Redactor,
        environ: Mapping[str, str],
        *,
        machines: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loaded = loaded
        self.redactor = redactor
        self.environ = environ
        self.settings = loaded.inventory.build
        # nix, git and ssh work for minutes, and need none of the operator's tokens.
        self.local = LocalRunner(without=secret_variables(loaded.inventory))
        self._machines = machines
        self._say = say
        self._stack = ExitStack()
        self._registries: dict[RegistryName, RegistryClient] = {}
        self._logins: dict[RegistryName, Callable[[], Login | None]] = {}
        # Reentrant: a login may need a secret that is kept in OpenBao.
        self._making = threading.RLock()
        # Of its own: a first client costs some time, in which the builders can be asked.
        self._registering = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def resolve(self, ref: SecretRef) -> Secret:
        """The secret that a reference of the inventory names; known to the redactor from here on."""
        return resolve_ref(
            ref,
            environ=self.environ,
            base=self.loaded.base,
            # A password manager that the inventory names is the operator's own program: it may need the tokens.
            local=LocalRunner(),
            redactor=self.redactor,
            openbao=self._openbao,
        )

    def _openbao(self) -> OpenBao:
        with self._making:
            return self._bao

    @functools.cached_property
    def _bao(self) -> OpenBao:
        from nixops.vault.openbao import OpenBao
        from nixops.vault.settings import settings_from

        settings = settings_from(self.loaded.inventory.vault, self.environ, self.resolve, self.loaded.base)
        return OpenBao(settings, self.redactor)

    # -- builders ---------------------------------------------------------------------------------------------

    @property
    def builders(self) -> tuple[PoolBuilder, ...]:
        """The pool's builders: the inventory's, a machines file's, EC2's."""
        with self._making:
            return self._builders

    @functools.cached_property
    def _builders(self) -> tuple[PoolBuilder, ...]:
        def unasked(error: NixopsError) -> None:
            self._say(f"builders in EC2 are left out: {error}")

        # Where there are others, EC2 that does not answer keeps nobody from building.
        return pool_of(self.loaded, machines=self._machines, on_fault=unasked)

    @property
    def ssh(self) -> SshPool:
        """The connections to the builders, one for each and run, shared with nix."""
        with self._making:
            return self._ssh

    @functools.cached_property
    def _ssh(self) -> SshPool:
        identity = builders_key(self.settings.ssh_key, self.resolve, self.environ)
        targets = [builder.target for builder in self._builders]
        return self._stack.enter_context(SshPool(targets, redactor=self.redactor, identity=identity))

    @property
    def pool(self) -> Pool:
        """The pool, to be probed."""
        with self._making:
            return self._pool

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(
            self._builders,
            self._ssh,
            self.quarantine,
            deadline=self.settings.probe_timeout,
            min_free=self.settings.min_free,
        )

    @functools.cached_property
    def quarantine(self) -> Quarantine:
        """The builders that failed a while ago."""
        return Quarantine.of(self.environ, self.settings.quarantine, say=self._say)

    @functools.cached_property
    def claims(self) -> Claims:
        """Who of this machine uses which builder."""
        return Claims.of(self.environ)

    def nix(self) -> Nix:
        """Nix here, for evaluations: it connects to nothing."""
        return self._local_nix

    @functools.cached_property
    def _local_nix(self) -> Nix:
        return Nix(self.local)

    def remote_nix(self) -> Nix:
        """Nix here, with the builders' stores within reach, by our keys and our trust."""
        with self._making:
            return self._remote_nix

    @functools.cached_property
    def _remote_nix(self) -> Nix:
        return Nix(self.local, env=self._ssh.nix_env())

    # -- registries -------------------------------------------------------------------------------------------

    def registry_settings(self, name: RegistryName) -> Registry:
        """What the inventory says of a registry; the defaults where it says nothing."""
        return self.loaded.inventory.registries.get(name, Registry())

    def login(self, name: RegistryName) -> Login | None:
        """The login to a registry: fresh, as some end after hours; None where nobody gave one."""
        with self._registering:
            if name not in self._logins:
                from nixops.registry.logins import login_for

                self._logins[name] = login_for(
                    name,
                    self.registry_settings(name),
                    environ=self.environ,
                    base=self.loaded.base,
                    resolve=self.resolve,
                    local=LocalRunner(),
                )
            found = self._logins[name]()
        if found is not None:
            self.redactor.add(found.password)
            # As the builder's file has it; some tool may print that.
            self.redactor.add(found.basic())
        return found

    def registry(self, name: RegistryName) -> RegistryClient:
        """A client of a registry, closed with the session."""
        with self._registering:
            if name not in self._registries:
                from nixops.registry.client import RegistryClient

                client = RegistryClient(
                    name,
                    settings=self.registry_settings(name),
                    login=lambda: self.login(name),
                    redactor=self.redactor,
                    base=self.loaded.base,
                )
                self._registries[name] = self._stack.enter_context(client)
            return self._registries[name]

    def authority(self, name: RegistryName) -> bytes:
        """The PEM text of the authority that a registry's certificate is checked by; empty: the machine's own.

        :raises NixopsError: the file cannot be read.
        """
        ca_file = self.registry_settings(name).ca_file
        if ca_file is None:
            return b""
        path = expanded(self.loaded.base, ca_file)
        try:
            return path.read_bytes()
        except OSError as error:
            raise NixopsError(f"registries.{name}.ca_file: {path} cannot be read: {error.strerror}") from None

    @property
    def state(self) -> Path:
        """The operator's directory for state of ours; not made here."""
        return state_directory(self.environ)
