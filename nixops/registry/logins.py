"""Where the login to a registry comes from: the inventory, AWS, docker's and podman's files and helpers, or nowhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nixops.errors import UsageError
from nixops.inventory.building import Registry
from nixops.inventory.fields import SecretRef
from nixops.registry.dockerconfig import default_places, read_docker_config
from nixops.registry.ecr import ecr_login, ecr_name
from nixops.registry.login import Login
from nixops.secret import Redactor, Secret
from nixops.transport.command import Runner
from nixops.values import RegistryName
from nixops.vault.files import expanded

# A login that ends is replaced when a quarter of its life, or this many seconds, are left: what is begun with it, a
# push for an hour, must not lose it half-way.
_EARLY = 3600.0
# One that ends sooner is kept this long all the same: asking for each request would only get us slowed down.
_LEAST = 30.0


def login_for(
    registry: RegistryName,
    settings: Registry | None,
    *,
    environ: Mapping[str, str],
    base: Path,
    resolve: Callable[[SecretRef], Secret],
    local: Runner,
    redactor: Redactor | None = None,
    clock: Callable[[], float] = time.time,
) -> Callable[[], Login | None]:
    """A function that gives the login to ``registry``; None is anonymous.

    Nothing is read before it is called. It reads once, and again when the login is old; several threads may call it.
    In order: ``user`` and ``password``, ``docker_config`` or ``ecr`` of the settings; a token of AWS where the name is
    one of Amazon ECR; what docker and podman keep in their usual places.

    :param settings: the inventory's ``registries`` entry, if it has one.
    :param environ: the operator's environment: where the usual places are.
    :param base: the inventory file's directory, where a relative ``docker_config`` starts.
    :param resolve: reads the secret that a reference names.
    :param local: runs credential helpers.
    :param redactor: learns each password.
    :param clock: Unix time.
    """
    settings = settings or Registry()

    def read() -> Login | None:
        if settings.user is not None and settings.password is not None:
            return Login(settings.user, resolve(settings.password))
        if settings.docker_config is not None:
            return _named_file(registry, expanded(base, settings.docker_config), local)
        if settings.ecr or ecr_name(registry) is not None:
            return ecr_login(registry, clock=clock)
        return _usual_places(registry, environ, local)

    return _Remembered(read, redactor, clock)


class _Remembered:
    """Reads a login once, and again before it ends."""

    def __init__(self, read: Callable[[], Login | None], redactor: Redactor | None, clock: Callable[[], float]) -> None:
        self._read = read
        self._redactor = redactor
        self._clock = clock
        self._lock = threading.Lock()
        self._known = False
        self._login: Login | None = None
        self._until: float | None = None

    def __call__(self) -> Login | None:
        with self._lock:
            if not self._known or (self._until is not None and self._clock() >= self._until):
                self._login = self._read()
                self._known = True
                self._until = self._fresh_until(self._login)
                if self._login is not None and self._redactor is not None:
                    self._redactor.add(self._login.password)
            return self._login

    def _fresh_until(self, login: Login | None) -> float | None:
        if login is None or login.expires is None:
            return None
        life = max(0.0, login.expires - self._clock())
        return self._clock() + max(_LEAST, life - min(_EARLY, life / 4))


def _named_file(registry: RegistryName, file: Path, local: Runner) -> Login:
    config = read_docker_config(file)
    login = config.login(registry, local) if config else None
    if login is None:
        why = "there is no such file" if config is None else f"it has no login for {registry}"
        raise UsageError(
            f"registries.{registry}.docker_config: {file}: {why}",
            hint=f"log in with: docker --config {file.parent} login {registry}",
        )
    return login


def _usual_places(registry: RegistryName, environ: Mapping[str, str], local: Runner) -> Login | None:
    for place in default_places(environ):
        config = read_docker_config(place)
        login = config.login(registry, local) if config else None
        if login is not None:
            return login
    return None
