"""`invoke deploy-runner` and `invoke verify-runner`."""

from __future__ import annotations

from invoke.tasks import task

from nixops.tasks.support import guarded

HELP = {
    "host": "the host's name in the inventory (default: the inventory's default)",
    "runner": "the runner's name on that host (default: the inventory's default)",
    "inventory": "the inventory file (default: inventory/hosts.yml)",
    "format": "text or json",
}


TEMPLATES = "a directory whose templates take the place of the shipped ones, file by file"


@task(
    name="deploy-runner",
    auto_shortflags=False,
    help={
        **HELP,
        "plan": "show what would be done and change nothing anywhere",
        "yes": "do not ask",
        "adopt": "take over rendered files that were edited by hand (the plan shows the diff)",
        "commit": "commit the rendered files to the checkout after the deploy has held",
        "templates": TEMPLATES,
    },
)
@guarded
def deploy_runner(  # type: ignore[no-untyped-def]  # invoke inspects the plain signature
    c,
    host=None,
    runner=None,
    plan=False,
    yes=False,
    inventory="inventory/hosts.yml",
    format="text",
    adopt=False,
    commit=False,
    templates=None,
):
    """From the inventory to a verified runner on a host: plan, ask, deploy, check, commit or roll back."""
    from nixops.deploy.commands import deploy_runner
    from nixops.deploy.subject import DeployOptions

    deploy_runner(
        DeployOptions(
            host=host,
            runner=runner,
            plan_only=plan,
            yes=yes,
            inventory=inventory,
            format=format,
            adopt=adopt,
            commit=commit,
            templates=templates,
        )
    )


@task(name="verify-runner", auto_shortflags=False, help=HELP)
@guarded
def verify_runner(c, host=None, runner=None, inventory="inventory/hosts.yml", format="text"):  # type: ignore[no-untyped-def]  # as above
    """Run the security and health checks of a runner alone; ends with 5 when one fails."""
    from nixops.deploy.commands import verify_runner
    from nixops.deploy.subject import DeployOptions

    verify_runner(DeployOptions(host=host, runner=runner, inventory=inventory, format=format))


@task(
    auto_shortflags=False,
    help={
        **HELP,
        "plan": "show what would be written and write nothing",
        "adopt": "take over rendered files that were edited by hand (the plan shows the diff)",
        "templates": TEMPLATES,
    },
)
@guarded
def render(  # type: ignore[no-untyped-def]  # as above
    c, host=None, runner=None, plan=False, inventory="inventory/hosts.yml", format="text", adopt=False, templates=None
):
    """Write a runner's files into the checkout and deploy nothing; asks only OpenBao, for versions."""
    from nixops.deploy.commands import render
    from nixops.deploy.subject import DeployOptions

    render(
        DeployOptions(
            host=host,
            runner=runner,
            plan_only=plan,
            inventory=inventory,
            format=format,
            adopt=adopt,
            templates=templates,
        )
    )
