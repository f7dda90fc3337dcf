"""The header of every rendered file: whose it is, how to change it, and a digest that shows edits by hand."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from nixops.render.literal import Language
from nixops.values import HostName, RunnerName

# All three languages take `#` comments. The digest covers every other line of the file, the header's too.
_MARK = re.compile(
    r"^# nixops: sha256=(?P<digest>[0-9a-f]{64})"
    r" template=(?P<template>\S+) host=(?P<host>\S+) runner=(?P<runner>\S+)\n",
    re.MULTILINE,
)
# Below this a line that looks like ours is somebody's text.
_HEADER_LINES = 8


@dataclass(frozen=True)
class Header:
    """What a file of ours says about itself.

    :ivar edited: its text is not what nixops wrote.
    """

    template: str
    host: str
    runner: str
    edited: bool


def with_header(body: str, *, template: str, host: HostName, runner: RunnerName, language: Language) -> str:
    """``body`` as a file of ours. It says nothing that changes from machine to machine or from day to day."""
    how = f"invoke render --host {host} --runner {runner}"
    said = (
        f"# Made by nixops from the template {template} and the inventory's runner {runner} of host {host}.\n"
        f"# To change this {language.value} file, edit one of these and run: {how}\n"
        "# An edit made here is reported as drift and never replaced without --adopt.\n"
    )
    rest = body if body.endswith("\n") else f"{body}\n"
    mark = f"# nixops: sha256={_digest(said, rest)} template={template} host={host} runner={runner}\n"
    return f"{said}{mark}\n{rest}"


def read_header(text: str) -> Header | None:
    """The header of a file of ours; ``None`` when the file is not ours."""
    found = _MARK.search(text)
    if not found or text.count("\n", 0, found.start()) >= _HEADER_LINES:
        return None
    before, after = text[: found.start()], text[found.end() :]
    # One empty line stands between header and body; without it the file was edited.
    edited = not after.startswith("\n") or _digest(before, after[1:]) != found["digest"]
    return Header(found["template"], found["host"], found["runner"], edited)


def _digest(before: str, after: str) -> str:
    return hashlib.sha256(f"{before}\n{after}".encode()).hexdigest()
