"""Building a toplevel (here, on the target, or on a builder) and bringing its closure to the host."""

from __future__ import annotations

from nixops.deploy.session import Session
from nixops.deploy.subject import Subject
from nixops.errors import BuildFailed
from nixops.nix.copy import import_closure
from nixops.nix.store_uri import StoreUri
from nixops.render.flake import FlakeAnswer
from nixops.transport.exec import StreamRunner
from nixops.transport.openssh import OpenSshFiles
from nixops.values import HostName, StorePath


def build_toplevel(session: Session, subject: Subject, answer: FlakeAnswer) -> StorePath:
    """Build what the flake evaluated to, where the inventory says (``deploy.build``).

    :raises BuildFailed: it does not build; ``detail`` is the end of its log.
    """
    where = subject.host.deploy.build
    seconds = session.config.build_timeout
    try:
        if where == "here":
            return session.nix().build(answer.installable, timeout=seconds).out
        name, host = (subject.host_name, subject.host) if where == "target" else session.loaded.host(where)
        target = session.target(name, host)
        with OpenSshFiles([target]) as ssh:
            return session.nix(ssh).build(answer.installable, store=StoreUri.ssh_ng(target), timeout=seconds).out
    except BuildFailed as error:
        raise BuildFailed(
            f"the toplevel of {subject.host_name} does not build ({where}): {error.message}",
            hint=error.hint,
            detail=error.detail,
        ) from None


def copy_toplevel(session: Session, subject: Subject, toplevel: StorePath, transport: StreamRunner) -> None:
    """Bring the closure to the host.

    root's login is trusted by the host's daemon and takes what ``nix copy`` sends; any other login need not be
    trusted, so its closure goes through root's ``nix-store --import``.

    :raises HostFault: the host's disk is full.
    """
    where = subject.host.deploy.build
    if where == "target":
        return
    seconds = session.config.build_timeout
    target = session.target(HostName(subject.host_name), subject.host)
    if where == "here":
        if target.user != "root":
            import_closure(session.local, transport, [toplevel], timeout=seconds)
            return
        with OpenSshFiles([target]) as ssh:
            session.nix(ssh).copy([toplevel], to=StoreUri.ssh_ng(target), timeout=seconds)
        return
    name, host = session.loaded.host(where)
    builder = session.target(name, host)
    with OpenSshFiles([builder, target]) as ssh:
        nix = session.nix(ssh)
        if target.user == "root":
            nix.copy([toplevel], to=StoreUri.ssh_ng(target), from_=StoreUri.ssh_ng(builder), timeout=seconds)
            return
        nix.copy([toplevel], to=StoreUri.daemon(), from_=StoreUri.ssh_ng(builder), timeout=seconds)
    import_closure(session.local, transport, [toplevel], timeout=seconds)
