"""The checked strings refuse what could be taken for an option, a path out of a checkout, or shell."""

from __future__ import annotations

import pytest

from nixops.values import AbsolutePath, Address, HostName, RelPath, RepoName, RunnerName, StorePath, VaultPath

HASH = "0123456789abcdfghijklmnpqrsvwxyz"


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (Address, "-oProxyCommand=touch /x"),
        (Address, "host name"),
        (Address, "host;rm"),
        (Address, "a:b:c:zz"),
        (Address, ""),
        (HostName, "-x"),
        (HostName, "a.b"),
        (HostName, "a" * 64),
        (RunnerName, "../x"),
        (RunnerName, ""),
        (RepoName, "owner"),
        (RepoName, "a/b/c"),
        (RepoName, "-a/b"),
        (RepoName, "owner/.."),
        (StorePath, "/nix/store/short-x"),
        (StorePath, f"/nix/store/{HASH}-x/bin"),
        (StorePath, f"/nix/store/{HASH}-x\n"),
        (AbsolutePath, "relative"),
        (AbsolutePath, "/a/../b"),
        (AbsolutePath, "/a b"),
        (AbsolutePath, "/a/$(x)"),
        (VaultPath, "/a"),
        (VaultPath, "a/../b"),
        (VaultPath, "a//b"),
        (RelPath, "../x"),
        (RelPath, "/etc"),
        (RelPath, "a/./b"),
    ],
)
def test_what_does_not_match_the_grammar_is_refused(kind: type[str], bad: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        kind(bad)


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (Address, "nix-cache02.home.2rjus.net"),
        (Address, "192.0.2.1"),
        (Address, "2001:db8::1"),
        (Address, "::1"),
        (HostName, "nix-cache02"),
        (RunnerName, "actions2"),
        (RepoName, "torjus/nixos-servers"),
        (StorePath, f"/nix/store/{HASH}-nixos-system-nix-cache02-25.05"),
        (AbsolutePath, "/var/lib/gitea-runner/actions2/cache"),
        (VaultPath, "hosts/nix-cache02/forgejo-runner-token-native"),
        (RelPath, "hosts/{host}/nixops-{runner}.nix"),
    ],
)
def test_the_seeds_own_names_are_accepted_and_stay_strings(kind: type[str], good: str) -> None:
    assert kind(good) == good


def test_a_dash_in_a_runners_name_is_escaped_as_systemd_does() -> None:
    assert RunnerName("nix-native").systemd_escaped() == r"nix\x2dnative"
