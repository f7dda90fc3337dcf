"""``invoke render``: the rendering stage alone."""

from __future__ import annotations

import json

from nixops.deploy.credentials import UNKNOWN_UUID, kept
from nixops.deploy.plan import render_facts, rendered_files
from nixops.deploy.result import RENDER_SCHEMA
from nixops.deploy.session import Session
from nixops.deploy.subject import DeployOptions, Subject
from nixops.errors import UsageError
from nixops.render.managed import FileStatus, apply_files, plan_files
from nixops.ui.report import Reporter


def render(session: Session, subject: Subject, options: DeployOptions, reporter: Reporter) -> None:
    """Show, and without ``plan_only`` write, the files of one runner. Nothing is registered and no host is asked.

    :raises UsageError: a connection's uuid is not known yet: only a deploy can register it.
    :raises DriftError: a file of ours was edited by hand.
    """
    credentials = kept(subject.runner, session.bao())
    unknown = [c.path for c in credentials if c.uuid == UNKNOWN_UUID]
    files = plan_files(
        session.checkout, rendered_files(session, subject, render_facts(credentials)), adopt=options.adopt
    )
    changed = [f for f in files if f.status is not FileStatus.UNCHANGED]
    if unknown and not options.plan_only:
        raise UsageError(
            f"not registered yet: {', '.join(unknown)}", hint="deploy-runner registers and renders in one go"
        )
    if not options.plan_only:
        apply_files(session.checkout, files, session.local)
    if options.json:
        listed = [{"path": str(f.path), "status": f.status.value, "diff": f.diff} for f in files]
        reporter.document(
            json.dumps({"schema": RENDER_SCHEMA, "written": not options.plan_only, "files": listed}, indent=2)
        )
        return
    for file in changed:
        reporter.result(f"{file.status} {file.path}")
        reporter.diff(file.diff)
    done = "would change" if options.plan_only else "changed"
    reporter.result(f"{len(changed)} file(s) {done}, {len(files) - len(changed)} unchanged in {session.checkout}")
