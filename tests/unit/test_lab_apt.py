"""Reading the machine's apt configuration."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import pytest

from nixops.errors import HostFault
from nixops.lab.apt import (
    AptSource,
    Fetch,
    apt_proxies,
    dearmour,
    fetcher,
    find_mirror,
    parse_deb822,
    parse_one_line,
    read_sources,
)
from nixops.transport.command import Command, LineSink, Result

DEBIAN = "Origin: Debian\nLabel: Debian\nSuite: stable\nCodename: trixie\n"
KEY = b"\x99\x02\x0d\x04 not a real key \xff" * 3


def armoured(key: bytes, empty: str = "") -> str:
    body = base64.b64encode(key).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    begin, end = "-----BEGIN PGP PUBLIC KEY BLOCK-----", "-----END PGP PUBLIC KEY BLOCK-----"
    return "\n".join([begin, "Comment: made for a test", empty, *lines, "=AbCd", end])


def serving(pages: Mapping[str, str]) -> Fetch:
    def fetch(url: str) -> bytes:
        if url not in pages:
            raise OSError("HTTP Error 404: Not Found")
        return pages[url].encode()

    return fetch


def test_one_line_sources_give_archives_with_their_keys() -> None:
    text = """
    # deb http://commented.example/ trixie main
    deb http://a.example/debian/ bookworm main contrib  # the archive
    deb-src http://a.example/debian bookworm main
    deb [ arch=amd64 signed-by=/usr/share/keyrings/b.gpg ] https://b.example/debian trixie main
    deb [trusted=yes] file:/srv/repo ./
    nonsense
    """
    assert parse_one_line(text) == [
        AptSource("http://a.example/debian", "bookworm", ("main", "contrib")),
        AptSource("https://b.example/debian", "trixie", ("main",), "/usr/share/keyrings/b.gpg"),
        AptSource("file:/srv/repo", "./", ()),
    ]


def test_deb822_sources_give_every_combination_and_leave_out_what_is_disabled() -> None:
    text = """\
# a comment
Types: deb deb-src
URIs: http://a.example/debian/ http://b.example/debian
# a comment between fields
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""
    found = parse_deb822(text)
    assert [(source.uri, source.suite) for source in found] == [
        ("http://a.example/debian", "bookworm"),
        ("http://a.example/debian", "bookworm-updates"),
        ("http://b.example/debian", "bookworm"),
        ("http://b.example/debian", "bookworm-updates"),
    ]
    assert {source.signed_by for source in found} == {"/usr/share/keyrings/debian-archive-keyring.gpg"}
    assert {source.components for source in found} == {("main", "contrib")}


def test_a_key_inside_a_deb822_source_is_kept_whole() -> None:
    block = "\n".join(" " + line for line in armoured(KEY, empty=".").splitlines())
    text = f"Types: deb\nURIs: http://a.example/debian\nSuites: trixie\nComponents: main\nSigned-By:\n{block}\n"
    (source,) = parse_deb822(text)
    assert dearmour(source.signed_by) == KEY


def test_both_kinds_of_files_are_read_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "b.list").write_text("deb http://b.example/debian bookworm main\n")
    (parts / "c.sources").write_text("Types: deb\nURIs: http://c.example/debian\nSuites: trixie\nComponents: main\n")
    (parts / "d.sources.bak").write_text("Types: deb\nURIs: http://d.example/debian\nSuites: x\nComponents: main\n")
    found = [source.uri for source in read_sources(tmp_path)]
    assert found == ["http://a.example/debian", "http://b.example/debian", "http://c.example/debian"]


def test_a_machine_without_apt_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match="this machine has no apt"):
        read_sources(tmp_path / "etc-apt")


def test_the_mirror_is_the_archive_that_says_it_is_debians(tmp_path: Path) -> None:
    keyring = tmp_path / "debian.gpg"
    keyring.write_bytes(KEY)
    sources = [
        AptSource("https://other.example/apt", "bookworm", ("main",)),
        AptSource("http://gone.example/debian", "bookworm", ("main",)),
        AptSource("http://a.example/debian-security", "bookworm-security", ("main",), str(keyring)),
        AptSource("http://a.example/debian", "bookworm", ("main",), str(keyring)),
    ]
    pages = {
        "https://other.example/apt/dists/trixie/InRelease": "Origin: Somebody\nCodename: trixie\n",
        "http://a.example/debian-security/dists/trixie/InRelease": DEBIAN,
        "http://a.example/debian/dists/trixie/InRelease": DEBIAN,
    }
    mirror = find_mirror("trixie", sources, serving(pages), tmp_path)
    assert (mirror.uri, mirror.keyring) == ("http://a.example/debian", KEY)


def test_without_a_mirror_the_error_says_what_was_asked_and_no_login_of_it() -> None:
    sources = [
        AptSource("https://me:hunter22@a.example/debian", "bookworm", ("main",)),
        AptSource("https://other.example/apt", "bookworm", ("main",)),
    ]
    pages = {"https://other.example/apt/dists/trixie/InRelease": "Origin: Somebody\n"}
    with pytest.raises(HostFault, match="no archive of this machine's apt configuration has Debian's trixie") as caught:
        find_mirror("trixie", sources, serving(pages))
    assert "https://a.example/debian: HTTP Error 404: Not Found" in str(caught.value)
    assert "https://other.example/apt: not Debian's own archive" in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_mirror_list_in_a_file_gives_its_first_mirror(tmp_path: Path) -> None:
    listing = tmp_path / "mirrors.list"
    listing.write_text("# chosen near by\n\nhttp://near.example/debian/ priority:1\nhttp://far.example/debian\n")
    keyring = tmp_path / "key.asc"
    keyring.write_text(armoured(KEY))
    sources = [AptSource(f"mirror+file:{listing}", "bookworm", ("main",), str(keyring))]
    mirror = find_mirror("trixie", sources, serving({"http://near.example/debian/dists/trixie/InRelease": DEBIAN}))
    assert (mirror.uri, mirror.keyring) == ("http://near.example/debian", KEY)


def test_keys_that_are_named_and_not_there_are_an_error(tmp_path: Path) -> None:
    sources = [AptSource("http://a.example/debian", "bookworm", ("main",), str(tmp_path / "absent.gpg"))]
    fetch = serving({"http://a.example/debian/dists/trixie/InRelease": DEBIAN})
    with pytest.raises(HostFault, match="no keys to check the Debian archive with"):
        find_mirror("trixie", sources, fetch, tmp_path)


@pytest.mark.parametrize("text", ["no key at all", armoured(KEY).replace("mQ", "!!")])
def test_a_broken_key_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(HostFault, match="a key of the apt configuration"):
        dearmour(text)


def test_the_fetcher_reads_files_and_reports_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "InRelease").write_text(DEBIAN)
    assert fetcher({})(f"file://{tmp_path}/InRelease").decode() == DEBIAN
    with pytest.raises(OSError, match="InRelease2"):
        fetcher({})(f"file://{tmp_path}/InRelease2")


class AptConfig:
    host = "localhost"

    def __init__(self, code: int, text: str) -> None:
        self._code, self._text = code, text

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        assert command.argv[0] == "apt-config" and on_line is None
        return Result(command, self._code, self._text.encode(), b"")


def test_the_proxies_of_apt_become_variables() -> None:
    text = (
        "Acquire=\n"
        "Acquire::http::Proxy=http://proxy.example:3128\n"
        "Acquire::http::Proxy::direct.example=DIRECT\n"
        "Acquire::https::Proxy=DIRECT\n"
    )
    assert apt_proxies(AptConfig(0, text)) == {"http_proxy": "http://proxy.example:3128"}
    assert apt_proxies(AptConfig(1, "")) == {}
