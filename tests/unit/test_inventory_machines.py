"""Nix's machines format, read: every field, positions for what is wrong, and the way back from what we write."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.build.model import PoolBuilder
from nixops.errors import InventoryError, UsageError
from nixops.inventory.export import to_machines
from nixops.inventory.load import load
from nixops.inventory.machines import MAX_BYTES, parse_machines, read_machines
from nixops.values import Address, System

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE" + "A" * 42
KEY64 = base64.b64encode(KEY.encode()).decode()
X86 = System("x86_64-linux")


def parse(text: str) -> tuple[PoolBuilder, ...]:
    return parse_machines(text, "/etc/nix/machines", system=X86)


def one(text: str) -> PoolBuilder:
    (builder,) = parse(text)
    return builder


def test_a_whole_line_is_read_field_by_field() -> None:
    builder = one(
        f"ssh-ng://nix@b1.example.org x86_64-linux,i686-linux /root/id 8 2 kvm,big-parallel benchmark {KEY64}"
    )
    target = builder.target
    assert (target.user, target.address, target.port) == ("nix", "b1.example.org", 22)
    assert (target.host_keys, str(target.identity_file)) == ((KEY,), "/root/id")
    assert builder.systems == ("x86_64-linux", "i686-linux")
    assert (builder.max_jobs, builder.speed_factor) == (8, 2)
    assert builder.features == {"kvm", "big-parallel"}
    assert builder.mandatory_features == {"benchmark"}
    assert (builder.source, builder.excluded) == ("machines /etc/nix/machines", None)


def test_what_is_left_out_or_a_dash_has_nixs_defaults() -> None:
    for text in ("b1", "b1 - - - - - - -", "ssh://b1", "  b1\t-   # a comment"):
        builder = one(text)
        assert (builder.name, builder.target.user, builder.target.port) == ("b1", "root", 22)
        assert (builder.systems, builder.max_jobs, builder.speed_factor) == ((X86,), 1, 1)
        assert (builder.features, builder.mandatory_features) == (frozenset(), frozenset())
        assert builder.target.identity_file is None
        assert builder.excluded == "its line in the machines file has no public host key (the eighth field)"


def test_comments_blank_lines_and_semicolons_are_nixs_own() -> None:
    text = "# all of them\n\nb1; b2 x86_64-linux # the second\r\n   ;;\nb3;b4\n"
    assert [b.name for b in parse(text)] == ["b1", "b2", "b3", "b4"]


@pytest.mark.parametrize(
    ("uri", "user", "address", "port"),
    [
        ("builder", "root", "builder", 22),
        ("nix@builder", "nix", "builder", 22),
        ("ssh://nix@builder", "nix", "builder", 22),
        ("ssh-ng://192.0.2.7", "root", "192.0.2.7", 22),
        ("ssh-ng://nix@builder:2222", "nix", "builder", 2222),
        ("ssh://nix@[2001:db8::1]:2222", "nix", "2001:db8::1", 2222),
        ("ssh-ng://[fe80::1%25eth0]", "root", "fe80::1%eth0", 22),
        ("ssh-ng://builder/?compress=true&max-connections=4", "root", "builder", 22),
    ],
)
def test_every_form_of_a_store_uri_is_read(uri: str, user: str, address: str, port: int) -> None:
    target = one(uri).target
    assert (target.user, target.address, target.port) == (user, address, port)


def test_a_uri_brings_its_key_and_identity_and_the_fields_win_over_them() -> None:
    uri = f"ssh-ng://b?ssh-key=/run/a&base64-ssh-public-host-key={KEY64.replace('=', '%3D')}"
    builder = one(uri)
    assert (builder.target.host_keys, str(builder.target.identity_file)) == ((KEY,), "/run/a")
    assert str(one(f"{uri} - /run/b").target.identity_file) == "/run/b"


def test_a_key_file_is_read_from_the_files_directory_when_it_is_relative() -> None:
    assert str(one("b - keys/id").target.identity_file) == "/etc/nix/keys/id"


def test_a_comment_in_a_public_key_is_dropped() -> None:
    encoded = base64.b64encode(f"{KEY} root@builder\n".encode()).decode()
    assert one(f"b - - - - - - {encoded}").target.host_keys == (KEY,)


def test_fractions_of_a_speed_factor_are_rounded_and_never_nothing() -> None:
    assert [one(f"b - - 1 {f}").speed_factor for f in ("0.2", "1.4", "2.6", ".5", "3.")] == [1, 1, 3, 1, 3]


def test_no_jobs_means_that_it_builds_nothing() -> None:
    assert one(f"b - - 0 - - - {KEY64}").excluded == "its line in the machines file allows it no jobs"


def test_several_lines_of_one_host_have_names_of_their_own() -> None:
    names = [b.name for b in parse("b.example.org\nb.example.org aarch64-linux\n192.0.2.1; [2001:db8::2]")]
    assert names == ["b-example-org", "b-example-org-2", "192-0-2-1", "2001-db8--2".replace("--", "-")]


def test_lines_whose_names_differ_in_case_alone_have_names_of_their_own() -> None:
    """ssh takes no notice of case where it looks up a host's key: each would be let pass for the other."""
    names = [b.name for b in parse("Build; build; BUILD-2")]
    assert [str(name) for name in names] == ["Build", "build-2", "BUILD-2-2"]


def test_a_password_in_a_uri_is_not_repeated() -> None:
    with pytest.raises(InventoryError) as caught:
        parse("ssh-ng://nix:correct-horse@battery@b.example.org")
    assert "is no store that is reached by SSH" in str(caught.value)
    assert "correct-horse" not in str(caught.value) and "battery" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "column", "says"),
    [
        ("b - ~no-such-user-here/key", 1, 5, "names the home of a user that is not there"),
        ("b?ssh-key=~no-such-user-here/key", 1, 1, "names the home of a user that is not there"),
        ("b1\n  https://cache.example.org", 2, 3, "is no store that is reached by SSH"),
        ("daemon", 1, 1, "is no store that is reached by SSH"),
        ("/nix/store", 1, 1, "is no store that is reached by SSH"),
        ("- x86_64-linux", 1, 1, "the store URI is missing"),
        ("ssh-ng://Root@b", 1, 1, "'Root' is no user name"),
        ("ssh-ng://-oProxyCommand=x", 1, 1, "is no store"),
        ("ssh-ng://-o", 1, 1, "is not a host address"),
        ("b:70000", 1, 1, "70000 is no port"),
        ("ssh-ng://b?remote-store=local", 1, 1, "the setting 'remote-store' of a store URI cannot be honoured"),
        ("b; b X86", 1, 6, "is not a Nix system"),
        ("b x86_64-linux,Bad", 1, 16, "is not a Nix system"),
        ("b - - many", 1, 7, "'many' is no number"),
        ("b - - 1.5", 1, 7, "'1.5' is no number"),
        ("b - - 99999", 1, 7, "99999 is more than 4096"),
        ("b - - 1 fast", 1, 9, "'fast' is no speed factor"),
        ("b - - 1 1 kvm,$x", 1, 15, "'$x' is no feature"),
        ("b - - 1 1 - - AAAA", 1, 15, "the public host key is wrong"),
        ("b - - 1 1 - - not64!", 1, 15, "the public host key is wrong: it is not valid base64"),
        (f"b - - 1 1 - - {KEY64} more", 1, 15 + len(KEY64) + 1, "at most 8 fields"),
        ("@x y", 1, 4, "nothing can stand behind @FILE"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, line: int, column: int, says: str) -> None:
    with pytest.raises(InventoryError) as caught:
        parse(text)
    position = caught.value.position
    assert position is not None
    assert (position.file, position.line, position.column) == ("/etc/nix/machines", line, column)
    assert says in str(caught.value)


def test_another_file_is_read_in_its_place_with_its_own_positions(tmp_path: Path) -> None:
    (tmp_path / "more").write_text("b2\n@deep/er\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "er").write_text("b3\nb4 Bad\n")
    (tmp_path / "machines").write_text("b1\n@more # the others\nb5")
    with pytest.raises(InventoryError) as caught:
        read_machines(tmp_path / "machines")
    assert str(caught.value).startswith(f"{tmp_path}/deep/er:2:4: 'Bad' is not a Nix system")
    (tmp_path / "deep" / "er").write_text("b3\nb4\n")
    assert [b.name for b in read_machines(tmp_path / "machines")] == ["b1", "b2", "b3", "b4", "b5"]


def test_a_file_that_includes_itself_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("@other")
    (tmp_path / "other").write_text("\n@machines")
    with pytest.raises(InventoryError, match=r"other:2:1: .*includes itself"):
        read_machines(tmp_path / "machines")


def test_a_file_that_cannot_be_read_is_a_usage_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        read_machines(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="it is no UTF-8 text"):
        read_machines(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="more than 1 MiB"):
        read_machines(tmp_path / "large")
    with pytest.raises(UsageError, match=r"machines:1:1: the machines file .* cannot be read"):
        parse_machines("@none", tmp_path / "machines")


@given(st.text())
def test_any_text_gives_builders_or_an_error_with_a_place(text: str) -> None:
    try:
        builders = parse(text)
    except InventoryError as error:
        assert error.position is not None
    except UsageError as error:
        assert text.count("@") and "cannot be read" in str(error)
    else:
        assert len({b.name for b in builders}) == len(builders)


# -- the way back ---------------------------------------------------------------------------------------------


def is_address(text: str) -> bool:
    """The inventory has no address that begins with a colon, but one."""
    try:
        return bool(Address(text))
    except ValueError:
        return False


identifiers = st.from_regex(r"[a-z0-9][a-z0-9-]{0,10}", fullmatch=True)
hosts = st.fixed_dictionaries(
    {
        "address": st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[a-z]{1,5}){0,2}", fullmatch=True)
        | st.ip_addresses().map(str).filter(is_address),
        "user": st.sampled_from(["root", "nix", "build_er"]),
        "host_key": st.sampled_from([KEY]),
        "builder": st.fixed_dictionaries(
            {
                "max_jobs": st.integers(1, 4096),
                "speed_factor": st.integers(1, 1000),
                "features": st.lists(identifiers, unique=True, max_size=3),
                "mandatory_features": st.lists(identifiers, unique=True, max_size=2),
                "systems": st.lists(
                    st.sampled_from(["x86_64-linux", "aarch64-linux", "i686-linux"]), unique=True, max_size=3
                ),
            }
        ),
    }
)


@given(
    st.lists(hosts, min_size=1, max_size=4, unique_by=lambda host: str(host["address"])),
    st.sampled_from([None, "/run/keys/id"]),
)
def test_what_the_inventory_exports_is_read_back_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, hosts: list[dict[str, object]], identity: str | None
) -> None:
    directory = tmp_path_factory.mktemp("inventory")
    entries = {
        f"h{n}": {**host, **({"ssh": {"identity_file": identity}} if identity else {})} for n, host in enumerate(hosts)
    }
    (directory / "hosts.yml").write_text(json.dumps({"hosts": entries}))
    loaded = load(directory / "hosts.yml")
    read = parse_machines(to_machines(loaded), "machines")
    assert len(read) == len(hosts)
    for builder, host in zip(read, loaded.inventory.hosts.values(), strict=True):
        wanted = host.builder
        assert wanted is not None
        assert (builder.target.address, builder.target.user) == (host.address, host.user)
        assert builder.target.host_keys == tuple(host.host_key)
        assert (str(builder.target.identity_file) if builder.target.identity_file else None) == identity
        assert builder.systems == (wanted.systems or (host.system,))
        assert (builder.max_jobs, builder.speed_factor) == (wanted.max_jobs, wanted.speed_factor)
        assert builder.features == set(wanted.features)
        assert builder.mandatory_features == set(wanted.mandatory_features)


@pytest.mark.nix_build
def test_nix_itself_takes_what_we_take(tmp_path: Path) -> None:
    """Nix reads the file as it reads its own: a line that we take is no format error to it."""
    file = tmp_path / "machines"
    file.write_text(f"ssh-ng://nix@127.0.0.1:1 x86_64-linux - 4 2 kvm,big-parallel benchmark {KEY64} # c\n")
    assert read_machines(file)[0].target.port == 1
    drv = 'derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; }'
    done = subprocess.run(
        ["nix-build", "--no-out-link", "--builders", f"@{file}", "--option", "substituters", "", "-E", drv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "bad machine specification" not in done.stderr, done.stderr
