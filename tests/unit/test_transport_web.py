"""What our clients of HTTP servers share: why an answer did not come, and what is shown of that."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from urllib3.exceptions import ProtocolError

from nixops.errors import NixopsError, UsageError
from nixops.lab.binarycache import BinaryCacheServer, CacheKeyPair, StaticCache
from nixops.nix.cache import BinaryCacheClient
from nixops.nix.narinfo import PublicKey
from nixops.registry.fault import NoAnswer
from nixops.registry.http import RegistryHttp
from nixops.secret import Redactor, Secret
from nixops.transport.web import EXCERPT, Fault, checked_ca, excerpt, fault_of, joined, last_words, shown
from nixops.values import RegistryName, StorePath
from tests.unit.raw_server import raw_server

PATH = StorePath(f"/nix/store/{'0' * 32}-x")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BinaryCacheServer]:
    """Anything that speaks TLS by an authority of its own."""
    with BinaryCacheServer(StaticCache(tmp_path / "cache", CacheKeyPair.generate("x-1")), tls=tmp_path) as running:
        yield running


def test_an_authority_file_that_is_gone_during_a_run_is_told_by_the_registrys_client(server: BinaryCacheServer) -> None:
    assert server.ca_file is not None
    host = server.url.removeprefix("https://")
    http = RegistryHttp(
        RegistryName(host), host, tls=True, ca_file=server.ca_file, timeout=5, redactor=Redactor(), sleep=lambda _: None
    )

    def ask() -> int:
        return http.send("GET", f"{server.url}/nix-cache-info", limit=1000, again=True).status

    assert ask() == 200
    server.ca_file.unlink()
    with pytest.raises(NoAnswer, match="could not be sent") as caught:
        ask()
    assert str(server.ca_file) in str(caught.value)
    assert f"registries.{host}.ca_file" in str(caught.value.hint)


def test_an_authority_file_that_is_gone_during_a_run_is_told_of_a_cache(server: BinaryCacheServer) -> None:
    assert server.ca_file is not None
    waits: list[float] = []
    keys = [PublicKey.parse(CacheKeyPair.generate("cache-1").public)]
    with BinaryCacheClient(server.url, keys, ca_file=server.ca_file, sleep=waits.append) as client:
        assert client.ask(PATH).detail == "HTTP 404"
        server.ca_file.unlink()
        asked = client.ask(PATH)
    assert asked.detail.startswith("the file of cache.ca_file is gone: ") and str(server.ca_file) in asked.detail
    assert waits == [], "asking again is of no use"


@pytest.mark.parametrize("location", ["http://[", "//[::1", "gopher://elsewhere/", "http://host:port/"])
def test_a_cache_that_redirects_to_no_address_is_told_as_that(location: str) -> None:
    keys = [PublicKey.parse(CacheKeyPair.generate("cache-1").public)]
    answer = f"HTTP/1.1 302 Go\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    with raw_server(answer.encode()) as url, BinaryCacheClient(url, keys, sleep=lambda _: None) as client:
        assert "one that it redirects to, cannot be used (" in client.ask(PATH).detail


# -- which failure it is --------------------------------------------------------------------------------------


def failure_of(act: Callable[[], object]) -> Exception:
    with pytest.raises((requests.exceptions.RequestException, OSError)) as caught:
        act()
    return caught.value


def get(url: str, *, patience: float = 5.0, **options: object) -> Callable[[], object]:
    return lambda: requests.get(url, timeout=(2, patience), **options)  # type: ignore[arg-type]  # as requests has them


def test_each_failure_of_a_real_request_is_told_from_the_others(server: BinaryCacheServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = {
            "late": failure_of(get(mute, patience=0.3)),
            "proxy": failure_of(get("http://forge.invalid", proxies={"http": "http://127.0.0.1:1"})),
            "refused": failure_of(get("http://127.0.0.1:1")),
            "unknown": failure_of(get("http://forge.invalid")),
            "tls": failure_of(get(server.url)),
            "gone": failure_of(get(server.url, verify=str(tmp_path / "absent.pem"))),
            "address": failure_of(get("http://host:port/")),
        }
    with raw_server(b"nothing of the kind\r\n\r\n") as url:
        found["cut"] = failure_of(get(url))
    assert {name: fault_of(error) for name, error in found.items()} == {
        "late": Fault.LATE,
        "proxy": Fault.PROXY,
        "refused": Fault.NO_CONNECTION,
        "unknown": Fault.UNKNOWN_NAME,
        "tls": Fault.TLS,
        "gone": Fault.AUTHORITIES,
        "address": Fault.NOT_SENT,
        "cut": Fault.CUT_OFF,
    }
    assert last_words(found["refused"]) == "Connection refused"
    assert "unable to get local issuer certificate" in last_words(found["tls"])
    assert str(tmp_path / "absent.pem") in last_words(found["gone"])
    for error in found.values():
        assert " object at 0x" not in last_words(error), error


def test_what_breaks_while_the_answer_is_read_is_a_cut_too() -> None:
    assert fault_of(ProtocolError("Connection broken")) is Fault.CUT_OFF
    assert fault_of(ValueError("Invalid IPv6 URL")) is Fault.NOT_SENT
    assert last_words(OSError(28, "No space left on device")) == "No space left on device"


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("no certificate\n", "no PEM certificate")])
def test_an_authority_file_that_cannot_be_used_is_a_mistake_of_usage(
    tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"^cache.ca_file: {file} cannot be used: .*{said}") as caught:
        checked_ca("cache.ca_file", file)
    assert isinstance(caught.value, NixopsError) and caught.value.hint
    assert checked_ca("cache.ca_file", None) is True


# -- what may be shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:pass-w0rd@host:1/path?X-Amz-Signature=s1gned#f", "https://host:1/path"),
        ("http://[", "an address that cannot be read"),
        ("", "nowhere"),
        ("/path?x=y", "/path"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(url: str, text: str) -> None:
    assert shown(url) == text


def test_a_location_is_joined_or_left_as_it_is() -> None:
    assert joined("http://host/v2/x", "/y?z") == "http://host/y?z"
    assert joined("http://host/v2/x", "http://[") == "http://["


def test_no_part_of_a_secret_stands_at_the_cut() -> None:
    redactor = Redactor()
    redactor.add(Secret("s3cr3t-and-long"))
    text = excerpt(redactor, "x" * (EXCERPT - 5) + "s3cr3t-and-long" + "y" * 50)
    assert "s3cr" not in text and len(text) == EXCERPT + 1 and text.endswith("…")
    assert excerpt(redactor, "one\r\n  two\t3") == "one two 3"


# -- loading --------------------------------------------------------------------------------------------------

# One thread is in the middle of importing requests when another begins to: as when hvac is loaded at the same time.
AT_ONCE = """
import sys, threading, time
from importlib.machinery import PathFinder

begun = threading.Event()

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "requests.exceptions":  # what requests loads first
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def slowly(module):
            begun.set()
            time.sleep(1)
            load(module)

        spec.loader.exec_module = slowly
        return spec

failed = []

def run(code):
    try:
        exec(code)
    except BaseException as error:
        failed.append(repr(error))

sys.meta_path.insert(0, Slow())
first = threading.Thread(target=run, args=("import requests",))
first.start()
begun.wait()
run(sys.argv[1])
first.join()
sys.exit("; ".join(failed) or 0)
"""
CACHE = """
from nixops.nix.cache import BinaryCacheClient
from nixops.nix.narinfo import PublicKey
BinaryCacheClient("http://127.0.0.1:1", [PublicKey.parse("x-1:" + "A" * 43 + "=")])
"""


@pytest.mark.parametrize("code", ["import nixops.registry.http", "import nixops.forge.http", CACHE])
def test_it_can_be_loaded_while_another_thread_loads_requests(code: str) -> None:
    """Python takes a part's lock before its package's: who asks for a part first would meet who loads the package."""
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
