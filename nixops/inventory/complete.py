"""Names for a shell's completion, read from the inventory without validating it: fast, and never an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nixops.errors import NixopsError, UsageError
from nixops.inventory.positions import Items, Scalar, ScalarValue, Table, parse
from nixops.inventory.source import read_text

FORMATS: Final = {"inventory": ("text", "json", "ansible", "ssh-config", "known-hosts", "machines")}
_DEFAULT_FILE: Final = "inventory/hosts.yml"
_FLAGS: Final = ("--host", "--runner", "--group", "--image", "--system", "--systems", "--format", "--shell")

BASH: Final = r"""# invoke's tasks and flags, and behind the flags the inventory's names.
_nixops_complete() {
    local program=${COMP_WORDS[0]/#\~/$HOME} previous=${COMP_WORDS[COMP_CWORD-1]} current=$2 candidates
    [ "$previous" = "=" ] && previous=${COMP_WORDS[COMP_CWORD-2]}
    [ "$current" = "=" ] && current=
    case $previous/$current in
        trust/-*)
            candidates=$("$program" --complete -- invoke "${COMP_WORDS[@]:1}" 2>/dev/null) ;;
        --host/*|--runner/*|--group/*|--image/*|--system/*|--systems/*|--format/*|--shell/*|trust/*)
            candidates=$("$program" completion --current="$COMP_CWORD" \
                --words="$(printf '%s\n' "${COMP_WORDS[@]}")" 2>/dev/null) ;;
        --inventory/*)
            local IFS=$'\n'
            COMPREPLY=($(compgen -f -- "$current"))
            return ;;
        *)
            candidates=$("$program" --complete -- invoke "${COMP_WORDS[@]:1}" 2>/dev/null) ;;
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "$current"))
}
complete -F _nixops_complete -o default invoke inv
"""

ZSH: Final = r"""# invoke's tasks and flags, and behind the flags the inventory's names.
_nixops_complete() {
    local program=${~${(Q)words[1]}} found
    case ${words[CURRENT-1]}/${words[CURRENT]} in
        trust/-*)
            found=$("$program" --complete -- invoke "${words[@]:1}" 2>/dev/null) ;;
        --(host|runner|group|image|system|systems|format|shell)/*|trust/*|*/--(host|runner|group|image|system|systems|format)=*)
            found=$("$program" completion --current="$((CURRENT - 1))" --words="${(F)words}" 2>/dev/null) ;;
        --inventory/*)
            _files
            return ;;
        *)
            found=$("$program" --complete -- invoke "${words[@]:1}" 2>/dev/null) ;;
    esac
    compadd -- ${(f)found}
}
compdef _nixops_complete invoke inv
"""


def candidates(words: Sequence[str], current: int, directory: Path) -> list[str]:
    """What may stand at the place of ``words[current]``; empty where that is no name of the inventory's.

    :param words: the command line so far, the program first. ``--host=x`` may be one word (zsh) or three (bash).
    :param directory: where the command would run.
    """
    here = words[current] if current < len(words) else ""
    before = [*words[:current], "", ""]
    previous = before[current - 1] if current else ""
    prefix = ""
    if here.startswith("--") and "=" in here:
        previous, _, here = here.partition("=")
        prefix = previous + "="
    elif here == "=":
        here = ""
    elif previous == "=":
        previous = before[current - 2]
    names = _names(previous, words, directory)
    return [prefix + name for name in names if name.startswith(here)]


def _names(flag: str, words: Sequence[str], directory: Path) -> list[str]:
    if flag == "--format":
        return list(next((f for task, f in FORMATS.items() if task in words), ("text", "json")))
    if flag == "--shell":
        return ["bash", "zsh"]
    if flag not in ("trust", *_FLAGS):
        return []
    path = Path(_value("--inventory", words) or _DEFAULT_FILE).expanduser()
    if path == Path(_DEFAULT_FILE):
        path = next((d / path for d in (directory, *directory.parents) if (d / path).is_file()), path)
    try:
        root = parse(read_text(directory / path), str(path))
    except NixopsError:
        return []
    if flag == "--group":
        return list(_below(root, "groups").entries)
    if flag == "--image":
        return list(_below(root, "images").entries)
    if flag in ("--system", "--systems"):
        return _systems(root)
    hosts = _below(root, "hosts")
    if flag in ("--host", "trust"):
        return list(hosts.entries)
    chosen = _value("--host", words) or _scalar(_below(root, "default"), "host")
    asked = [str(chosen)] if chosen in hosts.entries else list(hosts.entries)
    return list(dict.fromkeys(name for host in asked for name in _managed(_below(_below(hosts, host), "runners"))))


def _systems(root: Table) -> list[str]:
    """Every system that the file names anywhere."""
    layers = [_below(root, "defaults")]
    for section in ("groups", "hosts"):
        layers += [_below(_below(root, section), name) for name in _below(root, section).entries]
    found = [str(value) for layer in layers if (value := _scalar(layer, "system")) is not None]
    listed = [_below(layer, "builder").entries.get("systems") for layer in layers]
    listed += [_below(_below(root, "images"), name).entries.get("systems") for name in _below(root, "images").entries]
    for entry in listed:
        if entry is not None and isinstance(entry.value, Items):
            found += [str(item.value) for item in entry.value.items if isinstance(item, Scalar)]
    return list(dict.fromkeys(found))


def _value(flag: str, words: Sequence[str]) -> str:
    """The value that a flag has on the command line; empty when there is none."""
    for index, word in enumerate(words):
        if word == flag:
            following = [w for w in words[index + 1 : index + 3] if w != "="]
            return following[0] if following else ""
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return ""


def _below(table: Table, name: str) -> Table:
    entry = table.entries.get(name)
    if entry is not None and isinstance(entry.value, Table):
        return entry.value
    return Table({}, table.position, table.end, 0)


def _managed(runners: Table) -> list[str]:
    return [name for name in runners.entries if _scalar(_below(runners, name), "managed") is not False]


def _scalar(table: Table, name: str) -> ScalarValue:
    entry = table.entries.get(name)
    return entry.value.value if entry is not None and isinstance(entry.value, Scalar) else None


def print_candidates(words: Sequence[str], current: int) -> None:
    """Print :func:`candidates`, one on each line, for a command that would run here."""
    for name in candidates(words, current, Path.cwd()):
        print(name)


def print_script(shell: str) -> None:
    """Print the completion script of a shell.

    :raises UsageError: there is none for it.
    """
    scripts = {"bash": BASH, "zsh": ZSH}
    if shell not in scripts:
        raise UsageError(f"there is no completion for {shell!r}", hint="choose bash or zsh")
    print(scripts[shell], end="")
