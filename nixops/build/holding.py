"""How much of what a derivation needs each builder has already: it would build there without fetching the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from nixops.build.model import Evaluated, Probe
from nixops.errors import Interrupted, NixopsError
from nixops.nix.verbs import Nix
from nixops.transport.command import Command, Runner
from nixops.transport.fleet import fan_out
from nixops.values import HostName, StorePath

if TYPE_CHECKING:
    from nixops.nix.derivation import Derivation

# The inputs nearest to the image say most: far below are compilers' compilers that nobody fetches.
MOST_PATHS: Final = 400
_SECONDS: Final = 5.0
# Being there is as good as being valid for a choice, and costs no start of Nix.
_COUNT: Final = 'n=0; while read -r p; do [ -e "$p" ] && n=$((n + 1)); done; echo "$n"'


def inputs_of(nix: Nix, evaluated: Evaluated) -> tuple[StorePath, ...]:
    """What a builder should have already, the nearest to the image first; empty where that cannot be found out."""
    try:
        return nearest(evaluated, nix.derivation(evaluated.drv, recursive=True))
    except Interrupted:
        raise
    except NixopsError:
        return ()  # a worse choice, and no reason not to build


def held_by(
    evaluated: Evaluated,
    inputs: Callable[[], Sequence[StorePath]],
    probes: Sequence[Probe],
    runner: Callable[[HostName], Runner],
) -> dict[HostName, float]:
    """For each builder that may build it, which share of the image's inputs it has: 0 to 1.

    Nothing is asked where there is no choice. A builder that does not answer holds nothing.

    :param inputs: gives :func:`inputs_of` when it is needed.
    :param probes: of all builders; those that cannot be used, or do not fit, are left out.
    :param runner: the connection to a builder.
    """
    fit = [p for p in probes if p.usable and p.builder.takes(evaluated.system, evaluated.features)]
    paths = inputs() if len(fit) > 1 else ()
    if not paths:
        return {}
    question = "".join(f"{path}\n" for path in paths)

    def ask(probe: Probe) -> float:
        result = runner(probe.builder.name).run(Command.of("sh", "-c", _COUNT, stdin=question, timeout=_SECONDS))
        return int(result.out) / len(paths) if result.ok and result.out.strip().isdigit() else 0.0

    outcomes = fan_out(fit, ask, limit=64)
    return {outcome.item.builder.name: outcome.value or 0.0 for outcome in outcomes}


def nearest(evaluated: Evaluated, derivations: Mapping[StorePath, Derivation]) -> tuple[StorePath, ...]:
    """The outputs that the image is made from, the nearest first; the image itself counts too. Sources do not: they
    come from this machine, whoever builds.

    :param derivations: the closure of the image's derivation.
    """
    found: dict[StorePath, None] = {}
    waiting = deque([evaluated.drv])
    seen = {evaluated.drv}
    while waiting and len(found) < MOST_PATHS:
        derivation = derivations.get(waiting.popleft())
        if derivation is None:
            continue
        found.update(dict.fromkeys(path for path in derivation.outputs.values() if path is not None))
        for drv in derivation.input_drvs:
            if drv not in seen:
                seen.add(drv)
                waiting.append(drv)
    return tuple(found)[:MOST_PATHS]
