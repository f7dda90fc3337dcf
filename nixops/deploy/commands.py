"""The tasks about one runner, from options to an exit code: `deploy-runner`, `verify-runner` and `render`.

The inventory is read before the clients of hosts, Forgejo and OpenBao are loaded, which takes longer than to refuse it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nixops.deploy.result import BY_EXIT_CODE, DEPLOY_SCHEMA, RENDER_SCHEMA, VERIFY_SCHEMA, Document, Outcome
from nixops.deploy.session import Session
from nixops.deploy.subject import DeployOptions, Subject
from nixops.errors import NixopsError, UsageError
from nixops.inventory.load import load, locate
from nixops.secret import Redactor
from nixops.ui.ending import terminated_like_interrupted, told
from nixops.ui.report import Reporter


@contextmanager
def _task(options: DeployOptions, schema: str) -> Iterator[tuple[Session, Subject, Reporter]]:
    """The session of a task. Errors leave it with their secrets replaced.

    :param schema: of the document that says, in JSON mode, what kept the task from knowing its host.
    """
    if options.format not in ("text", "json"):
        raise UsageError(f"--format {options.format} is not known", hint="text or json")
    redactor = Redactor()
    reporter = Reporter(redactor)
    with terminated_like_interrupted():
        try:
            loaded = load(locate(options.inventory, Path.cwd()))
            host_name, runner_name = loaded.target(options.host, options.runner)
            host = loaded.host(host_name)[1]
            runner = loaded.runner(host_name, runner_name)[1]
            with Session(loaded, redactor, os.environ) as session:
                templates = Path(options.templates) if options.templates else None
                if templates is not None and not templates.is_dir():
                    raise UsageError(f"--templates {templates} is no directory")
                yield session, Subject(host_name, host, runner_name, runner, templates), reporter
        except (Exception, KeyboardInterrupt) as caught:
            if os.environ.get("NIXOPS_TRACEBACK") and not isinstance(caught, NixopsError):
                raise
            error = told(caught, redactor, options.inventory)
            if options.json and not reporter.documented:
                outcome = BY_EXIT_CODE.get(error.exit_code, Outcome.FAILED)
                reporter.document(Document(schema, outcome, [], str(error)).dumps())
            raise error from None


def deploy_runner(options: DeployOptions) -> None:
    """Plan, show, ask, deploy, report.

    :raises NixopsError: of the class whose exit code says how it ended.
    """
    with _task(options, DEPLOY_SCHEMA) as (session, subject, reporter):
        from nixops.deploy.runner import deploy

        deploy(session, subject, options, reporter)


def verify_runner(options: DeployOptions) -> None:
    """The checks alone.

    :raises ChecksFailed: at least one failed and is no accepted risk.
    """
    with _task(options, VERIFY_SCHEMA) as (session, subject, reporter):
        from nixops.deploy.runner import verify

        verify(session, subject, options, reporter)


def render(options: DeployOptions) -> None:
    """Show, and without ``plan_only`` write, the files of one runner. Nothing is registered and no host is asked.

    :raises UsageError: a connection's uuid is not known yet: only a deploy can register it.
    :raises DriftError: a file of ours was edited by hand.
    """
    with _task(options, RENDER_SCHEMA) as (session, subject, reporter):
        from nixops.deploy.rendering import render

        render(session, subject, options, reporter)
