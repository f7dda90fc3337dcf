"""The machine's own apt configuration, read to find the mirror that the lab's root tree comes from.

Nothing here names a mirror: what is used is what the machine already uses.
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nixops.errors import HostFault
from nixops.transport.command import Command, Runner

Fetch = Callable[[str], bytes]

# Debian's archive, wherever it is mirrored, has these names for its own releases; others have suites of their own.
_POCKETS = re.compile(r"(-|/)(security|updates|backports|proposed-updates|backports-sloppy|debug)$")


@dataclass(frozen=True)
class AptSource:
    """One archive that apt uses.

    :param uri: its root, as apt has it, without a slash at the end.
    :param signed_by: files (separated by white space or commas) or an armoured key; empty for apt's own keyrings.
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


@dataclass(frozen=True)
class Mirror:
    """A Debian archive that has the suite, and the keys that its signature is checked with (binary OpenPGP)."""

    uri: str
    keyring: bytes


def parse_one_line(text: str) -> list[AptSource]:
    """The archives of a ``sources.list`` (sources.list(5), "one-line-style format")."""
    found: list[AptSource] = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)((?:\s+\S+)*)\s*", line.partition("#")[0])
        if match is None:
            continue
        options, uri, suite, components = match.groups()
        settings = dict(option.partition("=")[::2] for option in (options or "").split())
        found.append(AptSource(uri.rstrip("/"), suite, tuple(components.split()), settings.get("signed-by", "")))
    return found


def parse_deb822(text: str) -> list[AptSource]:
    """The archives of a ``.sources`` file (sources.list(5), "deb822-style format")."""
    return [source for stanza in re.split(r"\n[ \t]*\n", text) for source in _of_stanza(_fields(stanza))]


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t") and name:
            fields[name] += "\n" + line.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if colon:
            fields[name] = value.strip()
    return fields


def _of_stanza(fields: Mapping[str, str]) -> Iterator[AptSource]:
    if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
        return
    for uri in fields.get("uris", "").split():
        for suite in fields.get("suites", "").split():
            components = tuple(fields.get("components", "").split())
            yield AptSource(uri.rstrip("/"), suite, components, fields.get("signed-by", "").strip())


def read_sources(etc: Path = Path("/etc/apt")) -> tuple[AptSource, ...]:
    """Every archive of the configuration directory ``etc``, in apt's order.

    :raises HostFault: there is no apt here.
    """
    if not etc.is_dir():
        raise HostFault(
            "this machine has no apt, and the lab's root tree is made of Debian packages",
            hint="run the lab on Debian or one of its relatives",
        )
    parts = sorted((etc / "sources.list.d").glob("*")) if (etc / "sources.list.d").is_dir() else []
    found: list[AptSource] = []
    for file in [etc / "sources.list", *parts]:
        if file.is_file() and file.suffix in (".list", ".sources"):
            text = file.read_text(encoding="utf-8", errors="replace")
            found += parse_one_line(text) if file.suffix == ".list" else parse_deb822(text)
    return tuple(found)


def apt_proxies(runner: Runner) -> dict[str, str]:
    """The proxies that apt is told to use, as the variables that other programs take: ``http_proxy`` and so on."""
    result = runner.run(Command.of("apt-config", "dump", "--format", "%f=%v%n"))
    found: dict[str, str] = {}
    for line in result.out.splitlines() if result.ok else ():
        match = re.fullmatch(r"Acquire::(https?|ftp)::Proxy=(\S+)", line)
        if match and match[2].upper() != "DIRECT":
            found[f"{match[1]}_proxy"] = match[2]
    return found


def find_mirror(suite: str, sources: Sequence[AptSource], fetch: Fetch, etc: Path = Path("/etc/apt")) -> Mirror:
    """The first archive of ``sources`` that is Debian's and has ``suite``.

    Other archives may have a component ``main`` and suites of the same names, so each is asked for its release
    file, and that has to say that its origin is Debian.

    :param fetch: gives the content behind a URL; raises :class:`OSError` when it cannot.
    :raises HostFault: there is none; the detail says why for each that was asked.
    """
    tried: list[str] = []
    for source in sources:
        if "main" not in source.components or _POCKETS.search(source.suite):
            continue
        uri = _real_uri(source.uri)
        try:
            release = fetch(f"{uri}/dists/{suite}/InRelease").decode(errors="replace")
        except (OSError, ValueError) as error:
            tried.append(f"{_printable_uri(uri)}: {error}")
            continue
        if re.search(r"^Origin: Debian$", release, re.MULTILINE):
            return Mirror(uri, _keyring(source.signed_by, etc))
        tried.append(f"{_printable_uri(uri)}: not Debian's own archive")
    raise HostFault(
        f"no archive of this machine's apt configuration has Debian's {suite}",
        hint="the lab runs on machines whose apt uses a Debian mirror; check the network and the sources of apt",
        detail="\n".join(tried) or None,
    )


def fetcher(proxies: Mapping[str, str], timeout: float = 20.0) -> Fetch:
    """A :data:`Fetch` over the network (or ``file:``) with apt's proxies; ``timeout`` in seconds."""
    handlers: list[urllib.request.BaseHandler] = []
    if proxies:
        known = {name.removesuffix("_proxy"): value for name, value in proxies.items()}
        handlers.append(urllib.request.ProxyHandler(known))
    opener = urllib.request.build_opener(*handlers)

    def fetch(url: str) -> bytes:
        with opener.open(url, timeout=timeout) as response:
            content: bytes = response.read()
        return content

    return fetch


def _real_uri(uri: str) -> str:
    """What stands behind ``mirror+file:``: the first archive that the list in that file names."""
    if not uri.startswith("mirror+file:"):
        return uri
    path = Path("/" + uri.removeprefix("mirror+file:").lstrip("/"))
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return uri
    return next((line.split()[0].rstrip("/") for line in lines if line.strip() and line[0] != "#"), uri)


def _printable_uri(uri: str) -> str:
    """``uri`` without a login that may stand in it."""
    parts = urlsplit(uri)
    return uri.replace(parts.netloc, parts.hostname or "", 1) if "@" in parts.netloc else uri


def _keyring(signed_by: str, etc: Path) -> bytes:
    if "-----BEGIN" in signed_by:
        return dearmour(signed_by)
    named = [Path(word) for word in re.split(r"[\s,]+", signed_by) if word.startswith("/")]
    files = named or [
        Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
        etc / "trusted.gpg",
        *sorted((etc / "trusted.gpg.d").glob("*.gpg")),
        *sorted((etc / "trusted.gpg.d").glob("*.asc")),
    ]
    keys = b"".join(_key(file) for file in files if file.is_file())
    if not keys:
        raise HostFault(
            "there are no keys to check the Debian archive with", hint="apt-get install debian-archive-keyring"
        )
    return keys


def _key(file: Path) -> bytes:
    content = file.read_bytes()
    return dearmour(content.decode(errors="replace")) if b"-----BEGIN" in content[:100] else content


def dearmour(text: str) -> bytes:
    """The binary form of ASCII-armoured OpenPGP keys (RFC 9580, 6.2); deb822 writes an empty line as a dot.

    :raises HostFault: it is no such text.
    """
    blocks = re.findall(r"-----BEGIN PGP [^\n]*-----\n(.*?)-----END PGP", text, re.DOTALL)
    try:
        keys = b"".join(base64.b64decode(_body(block), validate=True) for block in blocks)
    except binascii.Error as error:
        raise HostFault(f"a key of the apt configuration cannot be read: {error}") from None
    if not keys:
        raise HostFault("a key of the apt configuration is not in OpenPGP's armour")
    return keys


def _body(block: str) -> str:
    lines = [line.strip() for line in block.splitlines()]
    # Headers such as "Version: …" come before the first empty line; "=AbCd" at the end is a checksum.
    return "".join(line for line in lines if line not in ("", ".") and ":" not in line and not line.startswith("="))
