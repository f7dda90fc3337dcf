"""The inventory's reference, ``docs/inventory.md``, made from the models: ``python -m nixops.inventory.reference``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nixops.inventory import model
from nixops.inventory.settings import shown
from nixops.inventory.words import WORDS

# Each table of the reference: the model, the heading, and what is said before the table.
_TABLES: Final[tuple[tuple[type[BaseModel], str, str], ...]] = (
    (model.Forge, "forge", "The Forgejo whose API gives runners their credentials. Needed by managed runners."),
    (
        model.Vault,
        "vault",
        "The OpenBao (or Vault) that keeps what the hosts fetch. What is left out comes from `BAO_*`, then `VAULT_*`.",
    ),
    (model.VaultAppRoleAuth, "vault.approle", "How nixops logs in, where it is not by token."),
    (
        model.Config,
        "config",
        "The flake, and where in it rendered files go. `{host}`, `{runner}` and `{repo}` are filled in. Needed by "
        "managed runners.",
    ),
    (model.Default, "default", "What a task called without `--host`, `--runner` and `--image` works on."),
    (model.Build, "build", "The pool of builders, beside the hosts that have `builder:`, and its bounds."),
    (
        model.Ec2Pool,
        "build.ec2",
        "Builders found in EC2, with credentials by boto3's own chain. An instance's `Name` tag, or its id, names it.",
    ),
    (model.Image, "images.NAME", "An image, built once for each system, natively."),
    (
        model.Registry,
        "registries.HOST",
        "How to talk to a registry. The login is `user` and `password`, or `docker_config`, or `ecr`; without any of "
        "them, the operator's docker configuration is asked.",
    ),
    (model.BinaryCache, "cache", "The binary cache that `warm-cache` fills and asks."),
    (
        model.Host,
        "hosts.NAME",
        "One host. The same keys, but `groups`, stand in `defaults:` and in each group of `groups:`.",
    ),
    (model.Ssh, "hosts.NAME.ssh", "How to connect. Connection, login and command each have a time-out of their own."),
    (model.Builder, "hosts.NAME.builder", "A host that builds for others, in the terms of Nix's machines format."),
    (model.Deploy, "hosts.NAME.deploy", "The guarded activation."),
    (model.ManagedRunner, "hosts.NAME.runners.NAME", "A runner that nixops renders, registers, deploys and checks."),
    (
        model.UnmanagedRunner,
        "hosts.NAME.runners.NAME with managed: false",
        "A runner that is known, so that the checks can try whether ours can read its state, and otherwise left alone.",
    ),
    (model.Scope, "scope", "Whose jobs a registration admits: exactly one of these keys."),
    (model.TokenEntry, "token", "With several connections each has an entry of its own, `<path>-<owner>-<repo>`."),
    (model.Cache, "hosts.NAME.runners.NAME.cache", "The runner's actions cache."),
    (model.Limits, "limits", "Limits of the runner's unit, under systemd's own names."),
    (model.Workflow, "workflow", "What is rendered for each trusted repository."),
    (
        model.SecretRef,
        "References to secrets",
        "Wherever a secret is needed, the inventory says where it is read from: exactly one of these keys.",
    ),
    (model.OpenBaoRef, "openbao", "An entry of the KV v2 engine at `vault.mount`."),
)

_INTRODUCTION: Final = """\
# The inventory

<!-- Made by `python -m nixops.inventory.reference > docs/inventory.md` from the models; edit those. -->

One YAML file says which hosts there are, what runs on them, and which Forgejo, OpenBao and flake they belong to. The
shipped one is [hosts.yml](../inventory/hosts.yml); [builders.example.yml](../inventory/builders.example.yml) is a pool
of builders to copy from. Every task takes another file with `--inventory FILE`.

```yaml
forge:    {url: https://code.example.org, token: {env: FORGEJO_TOKEN}}
vault:    {address: https://vault.example.org:8200}
config:   {flake: ../nixos-servers}
default:  {host: nix-cache02, runner: actions2}
defaults: {user: root}                        # settings of every host
groups:   {cache: {ssh: {keepalive: 5}}}      # settings of every host that lists the group
hosts:
  nix-cache02:
    address: nix-cache02.example.org
    groups: [cache]
```

## Where a value comes from

A host's settings are `defaults`, then its groups in the order it lists them, then its own; the later one is stronger.
Mappings merge key by key; lists and single values are replaced; so are `scope` and `sudo_password`, since each is one
value. A key with nothing behind it, or `null`, takes out what was inherited. What nobody sets is built in.

`invoke inventory --host NAME` shows every value with its file, line and layer.

## Errors

Nothing is done with an inventory that is wrong: the task ends with exit code 2 and a line that says where, what, and
what to write instead; further errors follow below it.

```text
inventory/hosts.yml:40:18: hosts.nix-cache02.runners.actions2.labels[0]: expected a label with its schema, such as
native:host or ubuntu:docker://node:22-bookworm, found the text 'native' (write "native:host"; a bare label means
docker)
```

Unknown keys are errors, with the nearest known one. Text that YAML reads as something else has to be quoted
(`"no"`, `"400"`, `"0"`); `022`, `1:30` and dates stay text. Duplicate keys, tags (`!!python/…`), tabs in the
indentation and more than one document are errors. Anchors, aliases and merge keys (`<<`) work.

Besides each value, this is checked: the default exists; groups that hosts list are declared; `deploy.build` names a
builder for the host's system; no two hosts share an address and port; no two runners share an entry of the vault; a
registration's scope admits the trusted repositories; managed runners have a `forge` and a `config`; no secret stands in
a runner's `settings`.

## Giving it out

| `invoke inventory --format …` | what it is |
| --- | --- |
| `text` | hosts and runners; with `--host`, each value and its origin |
| `json` | everything, schema `nixops/inventory/1`, below |
| `ansible` | what `ansible -i inventory/ansible.sh` takes; with `--host`, the host's variables |
| `ssh-config` | an OpenSSH client configuration (`ssh -F`) |
| `known-hosts` | the pinned host keys, by name and by address |
| `machines` | the builders as a Nix machines file (`nix build --builders @FILE`) |

Secrets are in none of them: a reference is shown as what it refers to. `ssh-config` and `ansible` look up host keys by
the inventory's names, which is how `known-hosts` writes them.

```text
{"schema": "nixops/inventory/1", "file": "inventory/hosts.yml",
 "default": {…} | null, "forge": {…} | null, "vault": {…}, "config": {…} | null,
 "build": {…}, "images": {…}, "registries": {…}, "cache": {…} | null,
 "hosts": {"NAME": {"settings": {…as below…},
                    "origins": {"ssh.keepalive": {"kind": "default | group NAME | host | built-in",
                                                  "file": "…" | null, "line": 12 | null, "column": 5 | null}, …}}}}
```

## Pinning host keys

`invoke trust NAME` fetches the key a host offers, shows its fingerprint, asks, and writes `host_key:` into the file,
whose comments and layout stay. Compare the fingerprint with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the
host's own console. Without a terminal: `--yes --fingerprint SHA256:…`, which must match. Where another key is pinned
it ends with exit code 3, unless `--replace` is given.

## Completion

`eval "$(invoke completion --shell bash)"` (or `zsh`) in your shell's start file completes tasks, flags, and the
inventory's hosts, runners and groups: `invoke deploy-runner --host <TAB>`.
"""


_HEADER: Final = "| key | what it is for | value | example | built in |\n| --- | --- | --- | --- | --- |\n"


def reference() -> str:
    """The whole of ``docs/inventory.md``."""
    parts = [_INTRODUCTION, "\n## Keys\n"]
    for described, heading, text in _TABLES:
        parts.append(f"\n### {heading}\n\n{text}\n\n{_HEADER}")
        parts += _rows(described)
    return "".join(parts)


def _rows(described: type[BaseModel]) -> Iterator[str]:
    words = WORDS[described.__name__]
    for name, field in described.model_fields.items():
        word = words[name]
        cells = (f"`{name}`", word.text, word.expect, f"`{word.example}`", _built_in(field))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _built_in(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    if value is None or value in ((), {}, ""):
        return "none"
    return f"`{_yaml(shown(value))}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value.value if isinstance(value, Enum) else value)


if __name__ == "__main__":
    print(reference(), end="")
