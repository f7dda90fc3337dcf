"""Each field of the models in plain words: what it expects, an example, what it is for.

Errors (:mod:`.explain`) and the reference (:mod:`.reference`) both draw from here, so that they agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Word:
    """One field.

    :ivar expect: what the value is, with its article: ``a whole number from 1 to 65535``.
    :ivar example: a value as YAML writes it.
    :ivar text: what the field does, one sentence.
    :ivar item: what each item is, where the value is a list.
    """

    expect: str
    example: str
    text: str
    item: str = ""


REFERENCE: Final = "a reference to a secret"
_TEXT: Final = "text"
_PATH: Final = "an absolute path"
_SECONDS: Final = "a number of seconds, above 0 and at most 86400"
_SIZE: Final = "a size such as 16G or 80%, or infinity"
_WEIGHT: Final = "a whole number from 1 to 10000"
_IDENTIFIER: Final = "a name of letters, digits, '.', '_' and '-'"
_URL: Final = "an http:// or https:// address without a user, a query or a fragment"
_NAMES: Final = "a list of names"
_PACKAGE: Final = "a package's attribute in nixpkgs, such as gitMinimal"
_LABEL: Final = "a label with its schema, such as native:host or ubuntu:docker://node:22-bookworm"
_REPOSITORY: Final = "a repository, owner/name"
_YES_NO: Final = "true or false"
_SYSTEM: Final = "a Nix system, such as x86_64-linux"
_COUNT: Final = "a whole number from 0"
_LIMIT_HINT: Final = "systemd.resource-control(5)"

WORDS: Final[Mapping[str, Mapping[str, Word]]] = {
    "Inventory": {
        "forge": Word("a mapping", "{url: https://code.example.org, token: {env: FORGEJO_TOKEN}}", "The Forgejo."),
        "vault": Word("a mapping", "{address: https://vault.example.org:8200}", "The OpenBao (or Vault)."),
        "config": Word("a mapping", "{flake: ../nixos-servers}", "The flake, and where in it rendered files go."),
        "default": Word("a mapping", "{host: nix-cache02, runner: actions2}", "What a task called bare works on."),
        "build": Word("a mapping", "{probe_timeout: 5}", "The pool of builders and its bounds."),
        "images": Word(
            "a mapping of names to images",
            "{app: {flake: ../app, attribute: docker, systems: [x86_64-linux]}}",
            "The images that `build-image` builds by name.",
        ),
        "registries": Word(
            "a mapping of registries to their logins",
            "{registry.example.org: {user: ci, password: {env: REGISTRY_TOKEN}}}",
            "How to talk to a registry, where the docker configuration does not say it.",
        ),
        "cache": Word(
            "a mapping",
            '{url: http://cache.lan, host: c1, public_keys: ["c:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI="]}',
            "The binary cache that hosts substitute from.",
        ),
        "hosts": Word("a mapping of names to hosts", "{nix-cache02: {address: nix-cache02.example.org}}", "The hosts."),
    },
    "Default": {
        "host": Word("a host's name", "nix-cache02", "The host."),
        "runner": Word("a runner's name", "actions2", "The runner; may be left out where the host has only one."),
        "image": Word("an image's name", "app", "The image that `build-image` builds."),
    },
    "Build": {
        "ssh_key": Word(
            REFERENCE,
            "{aws: nix-runner-ssh-key}",
            "The private key for the builders' logins; else `ssh.identity_file`.",
        ),
        "machines": Word(_TEXT, "/etc/nix/machines", "A file in Nix's machines format whose builders join the pool."),
        "ec2": Word("a mapping", "{tags: {Role: nix-builder}}", "Builders found in EC2 by tag join the pool."),
        "probe_timeout": Word(
            "a number of seconds, above 0 and at most 300", "5", "How long all builders are waited for."
        ),
        "build_timeout": Word(_SECONDS, "7200", "How long one system's build may take."),
        "push_timeout": Word(_SECONDS, "3600", "How long one system's push may take."),
        "quarantine": Word("a number of seconds, at most 86400", "300", "How long a builder that failed is left out."),
        "min_free": Word(_COUNT + " (MiB)", "1024", "A builder with less free store space is left out."),
    },
    "Ec2Pool": {
        "tags": Word("a mapping of tags to values", "{Role: nix-builder}", "What an instance must be tagged with."),
        "regions": Word("a list of regions", "[eu-central-1]", "Where to look; empty: boto3's own.", item="a region"),
        "address": Word("private or public", "private", "Which of its addresses to connect to."),
        "host_key_tag": Word("a tag's name", "ssh-host-key", "The tag that holds its SSH host key."),
        "user": Word("a login name", "root", "Whom to log in as."),
        "port": Word("a whole number from 1 to 65535", "22", "The port of its sshd."),
        "builder": Word("a mapping", "{max_jobs: 8}", "What each of them can do."),
    },
    "Image": {
        "flake": Word("a flake reference", "../app", "The flake; a path is relative to the inventory."),
        "attribute": Word(
            "an attribute path",
            "docker",
            "The image in it: `docker` is `packages.{system}.docker`, or say where `{system}` stands.",
        ),
        "systems": Word(
            "a list of Nix systems", "[x86_64-linux, aarch64-linux]", "What it is built for.", item=_SYSTEM
        ),
        "destination": Word("registry/repository:tag", "registry.example.org/app:latest", "Where `--push` takes it."),
        "provenance": Word(_YES_NO, "false", "Attach an in-toto statement of how it was built, as `--provenance`."),
    },
    "Registry": {
        "user": Word(_TEXT, "ci", "Log in as this user."),
        "password": Word(REFERENCE, "{env: REGISTRY_TOKEN}", "With this password or token."),
        "docker_config": Word(_TEXT, "~/.docker/config.json", "Log in as this file says, credential helpers too."),
        "ecr": Word("true", "true", "Log in with a token from AWS; a registry with ECR's name needs no entry."),
        "ca_file": Word(_TEXT, "registry-ca.pem", "A CA certificate to trust, relative to the inventory."),
        "tls": Word(_YES_NO, "true", "False: plain HTTP, which shows the login to the network."),
        "timeout": Word(_SECONDS, "30", "How long one request may take."),
    },
    "BinaryCache": {
        "url": Word(_URL, "https://cache.example.org", "Where hosts substitute from."),
        "host": Word("a host's name", "nix-cache02", "Whose store it serves: systems are built there."),
        "public_keys": Word(
            "a list of public keys, name:base64",
            '["cache.example.org:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI="]',
            "Our keys; every path must be signed by one.",
            item="a public key, name:base64",
        ),
        "ca_file": Word(_TEXT, "cache-ca.pem", "A CA certificate to trust, relative to the inventory."),
    },
    "Forge": {
        "url": Word(_URL, "https://code.example.org", "The forge's address, as runners use it too."),
        "token": Word(REFERENCE, "{env: FORGEJO_TOKEN}", "The API token that gives runners their credentials."),
        "ca_file": Word(_TEXT, "ca.pem", "A CA certificate to trust, relative to the inventory."),
        "timeout": Word(_SECONDS, "30", "How long one request may take."),
    },
    "Vault": {
        "address": Word(_URL, "https://vault.example.org:8200", "The server; else `BAO_ADDR`, then `VAULT_ADDR`."),
        "host_address": Word(_URL, "https://10.0.0.2:8200", "How hosts reach it, where that differs."),
        "mount": Word(_IDENTIFIER, "secret", "The mount of the KV v2 engine."),
        "namespace": Word("a namespace, names joined by '/'", "ops", "The namespace; else `BAO_NAMESPACE`."),
        "ca_file": Word(_TEXT, "vault-ca.pem", "A CA certificate to trust, relative to the inventory."),
        "host_ca_file": Word(_PATH, "/etc/ssl/certs/vault-ca.pem", "The CA certificate's path on the hosts."),
        "timeout": Word(_SECONDS, "30", "How long one request may take."),
        "token": Word(REFERENCE, "{env: BAO_TOKEN}", "Log in with this token; else `BAO_TOKEN`, `~/.vault-token`."),
        "approle": Word("a mapping", "{role_id: {env: R}, secret_id: {env: S}}", "Log in with this AppRole instead."),
        "host_approle_mount": Word(_IDENTIFIER, "approle", "The AppRole mount of the hosts' own roles."),
        "role_prefix": Word("letters, digits, '_' and '-'", "host-", "Before a host's name in its role and policy."),
    },
    "VaultAppRoleAuth": {
        "role_id": Word(REFERENCE, "{env: BAO_ROLE_ID}", "The role's id."),
        "secret_id": Word(REFERENCE, "{env: BAO_SECRET_ID}", "The role's secret-id."),
        "mount": Word(_IDENTIFIER, "approle", "The AppRole mount that is logged in at."),
    },
    "Config": {
        "flake": Word(_TEXT, "../nixos-servers", "The flake's checkout, relative to the inventory."),
        "attribute": Word("an attribute path", "nixosConfigurations.{host}", "A host's configuration in the flake."),
        "runner_module": Word("a path in the checkout", "hosts/{host}/nixops-{runner}.nix", "The rendered module."),
        "tofu_file": Word("a path in the checkout", "terraform/vault/nixops-{host}-{runner}.tf", "The OpenTofu file."),
        "workflow_file": Word(
            "a path in the checkout",
            "workflows/{repo}/.forgejo/workflows/nixops-{runner}.yml",
            "The workflow of a trusted repository.",
        ),
        "build_timeout": Word(_SECONDS, "7200", "How long building a system may take."),
    },
    "Host": {
        "address": Word("a DNS name or an IP address", "nix-cache02.example.org", "What to connect to."),
        "port": Word("a whole number from 1 to 65535", "22", "The port of its sshd."),
        "user": Word("a login name", "root", "Whom to log in as; others than root go through sudo."),
        "host_key": Word(
            "an OpenSSH public key, or a list of them",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI…",
            "The pinned host key; `invoke trust HOST` writes it.",
            item="an OpenSSH public key, such as ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI…",
        ),
        "sudo_password": Word(REFERENCE, "{command: [pass, show, nix-cache02]}", "What sudo asks for, if it asks."),
        "system": Word(_SYSTEM, "x86_64-linux", "What it runs."),
        "groups": Word(_NAMES, "[cache, builders]", "Its groups, the last one strongest.", item="a group's name"),
        "builder": Word("a mapping", "{max_jobs: 8}", "Present on a host that builds for others."),
        "ssh": Word("a mapping", "{identity_file: ~/.ssh/id_ed25519}", "How to connect."),
        "deploy": Word("a mapping", "{build: target}", "Where its system is built, and the time each step has."),
        "approle_dir": Word(_PATH, "/var/lib/vault/approle", "Where its own AppRole is kept on it."),
        "protected_files": Word(
            "a list of absolute paths",
            "[/run/secrets/cache-secret]",
            "Files that no runner may be able to read; tried by `verify-runner`.",
            item=_PATH,
        ),
        "runners": Word("a mapping of names to runners", "{actions2: {name: nix-cache02-native}}", "Its runners."),
    },
    "Ssh": {
        "identity_file": Word(_TEXT, "~/.ssh/id_ed25519", "The private key; relative to the inventory."),
        "connect_timeout": Word(_SECONDS, "10", "How long the connection may take."),
        "login_timeout": Word(_SECONDS, "20", "How long the login may take."),
        "command_timeout": Word(_SECONDS, "120", "How long one command may take."),
        "keepalive": Word(_SECONDS, "15", "After how long a quiet connection is asked for a sign of life."),
    },
    "Builder": {
        "max_jobs": Word("a whole number from 1 to 4096", "8", "How many builds it runs at once."),
        "speed_factor": Word("a whole number from 1 to 1000", "2", "How fast it is, compared with the others."),
        "features": Word(_NAMES, "[big-parallel, kvm]", "The system features it has.", item=_IDENTIFIER),
        "mandatory_features": Word(_NAMES, "[benchmark]", "Builds must ask for all of these.", item=_IDENTIFIER),
        "systems": Word(
            "a list of Nix systems",
            "[aarch64-linux]",
            "What it builds for; empty: its own system.",
            item=_SYSTEM,
        ),
    },
    "Deploy": {
        "build": Word("`here`, `target`, or a host with builder", "target", "Where the host's system is built."),
        "activation_timeout": Word(_SECONDS, "300", "How long the activation may take."),
        "confirm_timeout": Word(_SECONDS, "120", "How long the host waits for the confirmation."),
        "lease_timeout": Word(_SECONDS, "120", "How long a lease holds without a sign of life."),
    },
    "ManagedRunner": {
        "managed": Word(_YES_NO, "true", "False: known, but not rendered, registered or deployed."),
        "name": Word(_TEXT, "nix-cache02-native", "The runner's name on the forge."),
        "module": Word(
            "gitea-actions-runner or forgejo-runner",
            "gitea-actions-runner",
            "Which NixOS module runs it. The newer `forgejo-runner` has one connection per trusted repository.",
        ),
        "labels": Word("a list of labels", '["native:host"]', "What `runs-on` may ask for.", item=_LABEL),
        "scope": Word(
            "a mapping with one of repository, organization, user, admin",
            "{user: torjus}",
            "Whose jobs the one registration of `gitea-actions-runner` admits; `forgejo-runner` has none.",
        ),
        "trusted": Word("a list of repositories", "[torjus/nixos-servers]", "Who may run jobs here.", item=_REPOSITORY),
        "accept_wider_scope": Word(_YES_NO, "false", "Accept that the scope admits more than `trusted` names."),
        "host_packages": Word("a list of packages", "[bash, nix]", "The PATH of host jobs.", item=_PACKAGE),
        "extra_host_packages": Word("a list of packages", "[cachix]", "Added to it.", item=_PACKAGE),
        "capacity": Word("a whole number from 1 to 256", "4", "How many jobs it runs at once."),
        "shutdown_timeout": Word("a time such as 5m or 1h30m, at most 24h", "5m", "How long a stop waits for jobs."),
        "cache": Word("a mapping", "{enabled: true}", "The actions cache."),
        "limits": Word("a mapping of systemd limits", "{MemoryMax: 16G}", "The unit's limits."),
        "token": Word("a mapping", "{path: hosts/nix-cache02/runner-token}", "The KV entry of its credential."),
        "token_file": Word(_PATH, "/run/secrets/runner-token", "The credential's file on the host."),
        "secret": Word(
            "vault.secrets or agent",
            "agent",
            "How the host fetches the credential: by the flake's own `vault.secrets` module, or by a unit of ours.",
        ),
        "isolate": Word(_YES_NO, "true", "Give it a user and state apart from the module's other instances."),
        "accepted_risks": Word(
            "a mapping of a risk to the reason", '{shared-store: "they deploy anyway"}', "Shown by the checks as such."
        ),
        "workflow": Word("a mapping", "{name: Build}", "The workflow rendered for trusted repositories."),
        "settings": Word("a mapping", "{log: {level: debug}}", "More of the runner's own settings; never a secret."),
    },
    "UnmanagedRunner": {
        "managed": Word("false", "false", "It is known, and neither rendered, registered nor deployed."),
        "name": Word(_TEXT, "nix-cache02", "Its name on the forge."),
        "module": Word("gitea-actions-runner or forgejo-runner", "gitea-actions-runner", "The module that runs it."),
        "labels": Word("a list of labels", '["ubuntu:docker://node:22-bookworm"]', "Its labels.", item=_LABEL),
        "token_file": Word(_PATH, "/run/secrets/forgejo-runner-token", "Its credential, unreadable for the others."),
    },
    "Scope": {
        "repository": Word(_REPOSITORY, "torjus/nixos-servers", "This repository."),
        "organization": Word(_IDENTIFIER, "infra", "Every repository of this organization."),
        "user": Word(_IDENTIFIER, "torjus", "Every repository of this account, which the API token is of."),
        "admin": Word("true", "true", "Every repository of the forge."),
    },
    "Cache": {
        "enabled": Word(_YES_NO, "true", "Whether there is one."),
        "dir": Word(_PATH, "/var/lib/gitea-runner/actions2/cache", "Where it is kept; below the runner's state."),
    },
    "Limits": {
        "MemoryMax": Word(_SIZE, "16G", f"Memory it cannot exceed, {_LIMIT_HINT}."),
        "MemoryHigh": Word(_SIZE, "12G", "Memory above which it is slowed down."),
        "MemorySwapMax": Word(_SIZE + ", or 0", '"0"', "Swap it cannot exceed."),
        "CPUQuota": Word("a percentage such as 400% (four CPUs)", '"400%"', "CPU time it cannot exceed."),
        "CPUWeight": Word(_WEIGHT, "50", "Its share of the CPU under load; others have 100."),
        "IOWeight": Word(_WEIGHT, "50", "Its share of the disk under load; others have 100."),
        "TasksMax": Word("a whole number from 16 to 4194304", "4096", "Threads and processes it cannot exceed."),
        "Nice": Word("a whole number from -20 to 19", "10", "The scheduling priority of its processes."),
    },
    "TokenEntry": {
        "path": Word("a path below the KV mount", "hosts/nix-cache02/runner-token", "The entry."),
        "key": Word(_IDENTIFIER, "token", "The key in it."),
        "owner": Word("api or tofu", "api", "Who writes it: nixops through the API, or OpenTofu."),
    },
    "Workflow": {
        "name": Word(_TEXT, "Build", "Its name."),
        "commands": Word("a list of commands", '["nix build"]', "What it runs.", item="a command as text"),
        "checkout": Word(_TEXT, "actions/checkout@v4", "The action that checks out."),
    },
    "SecretRef": {
        "env": Word("the name of an environment variable", "FORGEJO_TOKEN", "An environment variable of the task."),
        "file": Word(_TEXT, "~/.config/nixops/token", "A file of yours that nobody else can read (0600)."),
        "openbao": Word("a mapping with path and key", "{path: ops/forgejo, key: token}", "A KV entry of the vault."),
        "aws": Word(_TEXT, "forgejo-token", "A secret of AWS Secrets Manager, by name or ARN."),
        "command": Word(
            "a list, the program and its arguments",
            "[pass, show, forgejo]",
            "What it prints, less one newline; run without a shell.",
            item="an argument as text",
        ),
    },
    "OpenBaoRef": {
        "path": Word("a path below the KV mount", "ops/forgejo", "The entry."),
        "key": Word(_IDENTIFIER, "token", "The key in it."),
    },
}
