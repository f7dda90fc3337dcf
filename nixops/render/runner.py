"""Which files one runner needs, rendered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nixops.errors import UsageError
from nixops.inventory.derived import PathField, filled_path, host_secrets
from nixops.inventory.model import Config, Host, Inventory, KvOwner, ManagedRunner, RunnerModule
from nixops.render.context import RunnerFacts, managed, module_context, tofu_context, workflow_context
from nixops.render.engine import Engine
from nixops.render.header import with_header
from nixops.render.literal import Language
from nixops.values import HostName, RunnerName

__all__ = ["RenderedFile", "RunnerFacts", "render_runner"]


@dataclass(frozen=True)
class RenderedFile:
    """A file as it should be.

    :ivar path: in the checkout. With ``text`` ``None`` it may be a pattern.
    :ivar text: with its header; ``None`` when there should be no such file of this runner's.
    :ivar host: whose file it is, with ``runner``: a file of another one is never replaced.
    """

    path: PurePosixPath
    language: Language
    text: str | None
    host: str
    runner: str


def render_runner(
    inventory: Inventory, host: HostName, runner: RunnerName, facts: RunnerFacts, *, templates: Path | None = None
) -> tuple[RenderedFile, ...]:
    """Everything nixops renders for one runner: its NixOS module, OpenTofu's KV entries, the workflows.

    Touches no file and asks nobody.

    :param templates: a directory whose templates take the place of the shipped ones, file by file.
    :raises UsageError: the inventory lacks something, or two of its parts would share a file or a secret.
    :raises TemplateError: a template is wrong, or a value has no literal.
    """
    config = _config(inventory)
    entry, managed_runner = managed(inventory, host, runner)
    _secrets_differ(host, entry)
    engine = Engine(templates)

    def file(field: PathField, template: str, context: dict[str, Any], repo: str = "") -> RenderedFile:
        language = Language.of_template(template)
        body = engine.render(template, context)
        text = with_header(body, template=template, host=host, runner=runner, language=language)
        return RenderedFile(filled_path(config, field, host, runner, repo), language, text, host, runner)

    def absent(field: PathField, language: Language, repo: str = "") -> RenderedFile:
        return RenderedFile(filled_path(config, field, host, runner, repo), language, None, host, runner)

    module = "runner-gitea.nix.j2" if managed_runner.module is RunnerModule.GITEA else "runner-forgejo.nix.j2"
    files = [file("runner_module", module, module_context(inventory, host, runner, facts))]
    # One KV entry has one owner: where it is the API, a file that OpenTofu would write it from has to go.
    if managed_runner.token.owner is KvOwner.TOFU:
        files.append(file("tofu_file", "kv.tf.j2", tofu_context(inventory, host, runner)))
    else:
        files.append(absent("tofu_file", Language.HCL))
    for repo in managed_runner.trusted:
        context = workflow_context(inventory, host, runner, repo)
        files.append(file("workflow_file", "workflow.yml.j2", context, repo))
    # The workflows of repositories that are no longer trusted.
    files.append(absent("workflow_file", Language.YAML, "*/*"))
    _paths_differ(files)
    return tuple(files)


def _config(inventory: Inventory) -> Config:
    if inventory.config is None:
        raise UsageError("the inventory names no flake", hint="add config: {flake: path/to/checkout}")
    return inventory.config


def _secrets_differ(host_name: HostName, host: Host) -> None:
    """Names that only come about here (one entry per connection) must not meet another runner's."""
    seen: dict[str, str] = {}
    for name, runner in host.runners.items():
        if not isinstance(runner, ManagedRunner):
            continue
        for secret in host_secrets(runner):
            for place in (secret.kv_path, secret.file):
                if seen.setdefault(place, name) != name:
                    raise UsageError(f"runners {seen[place]} and {name} of {host_name} share the token path {place}")


def _paths_differ(files: list[RenderedFile]) -> None:
    paths = [f.path for f in files if f.text is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(
                f"several files would be rendered to {path}", hint="use {host}, {runner} and {repo} in config's paths"
            )
