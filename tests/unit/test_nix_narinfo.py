"""Narinfos: read as strictly as Nix does, and signatures as `nix store sign` makes them."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.lab.binarycache import CacheKeyPair, text_of
from nixops.nix.narinfo import (
    Narinfo,
    NarinfoError,
    PublicKey,
    Verdict,
    nar_hash,
    nix32,
    parse_cache_info,
    parse_narinfo,
)
from nixops.values import StorePath

FEATURES = ("--extra-experimental-features", "nix-command")
ONE = StorePath("/nix/store/00000000000000000000000000000001-one-1.0")
TWO = StorePath("/nix/store/00000000000000000000000000000002-two-2.0")
HASH = "sha256:" + nix32(hashlib.sha256(b"nar").digest())
INFO = Narinfo(ONE, "nar/one.nar", HASH, 120, (TWO, ONE), (), 120)
TEXT = text_of(INFO, ())


@pytest.fixture(scope="module")
def key() -> CacheKeyPair:
    return CacheKeyPair.generate("cache.example.org-1")


def run(*argv: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- against Nix itself ---------------------------------------------------------------------------------------


def test_what_nix_copy_wrote_and_signed_is_read_and_verified(tmp_path: Path, key: CacheKeyPair) -> None:
    """A chroot store of our own, two paths of which one refers to the other, a cache made by the real nix."""
    store = f"local?root={tmp_path / 'root'}"
    secret = tmp_path / "secret"
    secret.write_text(key.secret.reveal())
    for name in ("library", "tool"):
        (tmp_path / name).write_text(f"the {name}\n")
    env = {"NIX_REMOTE": store}
    library = StorePath(run("nix-store", "--add", tmp_path / "library", env=env).strip())
    run("nix", *FEATURES, "store", "sign", "--store", store, "-k", secret, library)
    to = f"file://{tmp_path / 'cache'}?compression=none"
    run("nix", *FEATURES, "copy", "--from", store, "--to", to, library)
    info = parse_narinfo((tmp_path / "cache" / f"{library.hash_part}.narinfo").read_text())
    assert info.path == library
    assert info.judge([PublicKey.parse(key.public)]) == (Verdict.SERVED, "signed by cache.example.org-1")
    archive = (tmp_path / "cache" / info.url).read_bytes()
    assert (info.nar_size, info.file_size) == (len(archive), len(archive))
    assert info.nar_hash == "sha256:" + nix32(hashlib.sha256(archive).digest())
    assert parse_cache_info((tmp_path / "cache" / "nix-cache-info").read_text())["StoreDir"] == "/nix/store"


def test_what_we_sign_with_references_is_a_signature_to_nix(tmp_path: Path, key: CacheKeyPair) -> None:
    """The order of references and the form of the hash in the fingerprint are Nix's: it takes our signature, and
    refuses the same path when one reference is left out of what was signed.
    """
    store = f"local?root={tmp_path / 'root'}"
    env = {"NIX_REMOTE": store}
    (tmp_path / "zlib").write_text("z\n")
    (tmp_path / "alib").write_text("a\n")
    libraries = [StorePath(run("nix-store", "--add", tmp_path / name, env=env).strip()) for name in ("zlib", "alib")]
    root = Path(tmp_path / "root")
    tool = StorePath("/nix/store/" + "1" * 32 + "-tool")
    archive = b"".join(
        _nar_string(part)
        for part in (b"nix-archive-1", b"(", b"type", b"regular", b"contents", " ".join(libraries).encode(), b")")
    )
    info = Narinfo(
        tool,
        f"nar/{tool.hash_part}.nar",
        "sha256:" + nix32(hashlib.sha256(archive).digest()),
        len(archive),
        tuple(sorted(libraries, reverse=True)),
    )
    cache = tmp_path / "cache"
    run("nix", *FEATURES, "copy", "--from", store, "--to", f"file://{cache}?compression=none", *libraries)
    (cache / "nar" / f"{tool.hash_part}.nar").write_bytes(archive)
    place = cache / f"{tool.hash_part}.narinfo"
    options = ("--option", "trusted-public-keys", key.public, "--option", "require-sigs", "true")

    forged = Narinfo(info.path, info.url, info.nar_hash, info.nar_size, info.references[:1])
    place.write_text(text_of(info, (key.sign(forged),)))
    assert parse_narinfo(place.read_text()).judge([PublicKey.parse(key.public)])[0] is Verdict.BAD_SIGNATURE
    refused = subprocess.run(
        ["nix", *FEATURES, "copy", *options, "--from", f"file://{cache}", "--to", store, tool],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "lacks a valid signature" in refused.stderr or "lacks a signature by a trusted key" in refused.stderr

    place.write_text(text_of(info, (key.sign(info),)))
    assert parse_narinfo(place.read_text()).judge([PublicKey.parse(key.public)])[0] is Verdict.SERVED
    run("nix", *FEATURES, "copy", *options, "--from", f"file://{cache}", "--to", store, tool)
    assert (root / tool[1:]).read_text() == " ".join(libraries)


def _nar_string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + b"\0" * (-len(data) % 8)


def test_every_form_of_a_hash_that_nix_writes_is_the_same_one() -> None:
    raw = hashlib.sha256(b"x").digest()
    plain = base64.b64encode(raw).decode()
    wanted = run("nix", *FEATURES, "hash", "to-base32", "--type", "sha256", raw.hex()).strip()
    for form in (f"sha256:{raw.hex()}", f"sha256:{wanted}", f"sha256:{plain}", f"sha256-{plain}"):
        assert nar_hash(form) == f"sha256:{wanted}"


# -- verdicts -------------------------------------------------------------------------------------------------


def test_each_kind_of_signature_has_its_verdict(key: CacheKeyPair) -> None:
    ours = [PublicKey.parse(key.public)]
    other = CacheKeyPair.generate("upstream-1")
    imposter = CacheKeyPair.generate("cache.example.org-1")

    def verdict(*signatures: str) -> Verdict:
        return parse_narinfo(text_of(INFO, signatures)).judge(ours)[0]

    assert verdict() is Verdict.UNSIGNED
    assert verdict(other.sign(INFO)) is Verdict.WRONG_KEY
    assert verdict(imposter.sign(INFO)) is Verdict.BAD_SIGNATURE
    assert verdict("cache.example.org-1:not base64") is Verdict.BAD_SIGNATURE
    assert verdict("nonsense") is Verdict.WRONG_KEY
    assert verdict(other.sign(INFO), imposter.sign(INFO), key.sign(INFO)) is Verdict.SERVED
    # One of two keys of ours, as while a key is being replaced.
    both = [PublicKey.parse(other.public), *ours]
    assert parse_narinfo(text_of(INFO, (key.sign(INFO),))).judge(both)[0] is Verdict.SERVED


@pytest.mark.parametrize(
    "change", ["NarSize: 120", "NarHash: ", "References: ", "StorePath: "], ids=lambda text: text.split(":")[0]
)
def test_a_change_of_anything_that_is_signed_breaks_the_signature(key: CacheKeyPair, change: str) -> None:
    other = Narinfo(TWO, INFO.url, "sha256:" + nix32(b"\1" * 32), 121, (ONE,))
    mine, others = text_of(INFO, (key.sign(INFO),)).splitlines(), text_of(other, ()).splitlines()
    name = change.split(":")[0] + ": "
    mixed = [next(o for o in others if o.startswith(name)) if line.startswith(name) else line for line in mine]
    assert mixed != mine
    assert parse_narinfo("\n".join(mixed) + "\n").judge([PublicKey.parse(key.public)])[0] is Verdict.BAD_SIGNATURE


# -- the parser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cut off"),
        (TEXT[:-1], "cut off"),
        (TEXT + "\n", "no 'name: value'"),
        (TEXT.replace("References: ", "References:"), "no 'name: value'"),
        (TEXT + "NarSize: 120\n", "says NarSize twice"),
        (TEXT.replace("NarSize: 120", "NarSize: 0"), "NarSize is 0"),
        (TEXT.replace("NarSize: 120", "NarSize: -1"), "no number"),
        (TEXT.replace("NarSize: 120", "NarSize: 0120"), "no number"),
        (TEXT.replace("NarSize: 120", "NarSize: ١٢٠"), "no number"),
        (TEXT.replace("FileSize: 120", "FileSize: x"), "no number"),
        (TEXT.replace("URL: nar/one.nar", "URL: "), "does not say URL"),
        (TEXT.replace("NarHash: ", "Narhash: "), "does not say NarHash"),
        (TEXT.replace("NarHash: sha256", "NarHash: md5"), "no SHA-256"),
        (TEXT.replace(str(HASH), HASH[:-1] + "e"), "no SHA-256"),
        (TEXT.replace("StorePath: /nix", "StorePath: /gnu"), "no store path"),
        (TEXT.replace("References: ", "References: ../../etc/passwd "), "no store path"),
        ("<html>404</html>\n", "no 'name: value'"),
    ],
)
def test_what_nix_would_not_take_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(NarinfoError, match=why):
        parse_narinfo(text)


def test_a_path_without_references_and_one_that_upstream_compressed_are_read() -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(("References", "FileSize"))]
    info = parse_narinfo("\n".join([*lines, "Deriver: x.drv", "CA: fixed:r:sha256:1", "System: x"]) + "\n")
    assert (info.references, info.file_size) == ((), None)


base32 = st.text("0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32)
paths = st.builds(
    lambda part, name: StorePath(f"/nix/store/{part}-{name}"),
    base32,
    st.from_regex(r"[A-Za-z0-9+._?=-]{1,40}", fullmatch=True),
)


@given(
    path=paths,
    size=st.integers(1, 2**62),
    digest=st.binary(min_size=32, max_size=32),
    references=st.lists(paths, max_size=5),
)
def test_what_is_written_is_read_again(path: StorePath, size: int, digest: bytes, references: list[StorePath]) -> None:
    hashed = "sha256:" + nix32(digest)
    info = Narinfo(path, "nar/x", hashed, size, tuple(references), ("k:c2ln",), size)
    assert parse_narinfo(text_of(info, info.signatures)) == info
    assert nar_hash("sha256:" + digest.hex()) == hashed == nar_hash(hashed)


@given(st.text())
def test_any_text_is_a_narinfo_or_refused_in_words(text: str) -> None:
    for given_text in (text, text + "\n", TEXT[: len(text)] + text):
        try:
            assert parse_narinfo(given_text).nar_size > 0
        except NarinfoError as error:
            assert str(error)
        try:
            assert "StoreDir" in parse_cache_info(given_text)
        except NarinfoError as error:
            assert str(error)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":AAAA", "a b:" + "A" * 43 + "=", "a:" + "A" * 40, "a:\u00e9" + "A" * 42 + "="]
)
def test_a_key_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no public key"):
        PublicKey.parse(text)
