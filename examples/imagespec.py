"""How a Python tool has its images built: an ImageSpec in, the name of what was pushed out.

    python examples/imagespec.py --inventory inventory/hosts.yml --flake ../app --registry registry.example.org \\
        --name team/app --tag 1.2 --platform linux/amd64 --platform linux/arm64

Workflow tools (Flyte's ImageSpec is one) describe an image, ask a builder of their choice for it before a run, and use
the name that comes back. All that such a builder needs of nixops is below: no credential passes through it, no address
of a builder stands in it, and a builder that is down is nothing it has to know of.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nixops.build import BuildSession, ImageRequest, build_image, image_spec
from nixops.errors import ExitCode, NixopsError, UsageError, printable
from nixops.inventory.load import load
from nixops.secret import Redactor
from nixops.ui.ending import told

# What container tools call a platform → what Nix calls it.
SYSTEMS: Mapping[str, str] = {"linux/amd64": "x86_64-linux", "linux/arm64": "aarch64-linux"}


@dataclass(frozen=True)
class ImageSpec:
    """An image as a workflow tool describes it.

    :ivar flake: where its flake is; ``attribute``: the image in it.
    :ivar platforms: as container tools name them; the tag names an index over all of them.
    """

    name: str
    registry: str
    flake: str
    tag: str = "latest"
    attribute: str = "docker"
    platforms: tuple[str, ...] = ("linux/amd64",)

    @property
    def image_name(self) -> str:
        """``registry/name:tag``."""
        return f"{self.registry}/{self.name}:{self.tag}"


class NixImageBuilder:
    """Builds images on the inventory's builders.

    :param inventory: the inventory file: builders, their host keys, the registries' logins.
    :param say: gets a line for each thing that happens.
    """

    def __init__(
        self, inventory: Path, environ: Mapping[str, str] = os.environ, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._loaded = load(inventory)
        self._environ = environ
        self._say = say

    def build(self, spec: ImageSpec, *, push: bool = True) -> str:
        """Build the image for each of its platforms and push it; again, if it is there already, costs a second.

        :returns: ``registry/name@sha256:…``, which never means another image; without ``push``, the store path of
            the first platform's image, on its builder.
        :raises NixopsError: it could not be built or pushed; the tag is where it was.
        """
        unknown = [platform for platform in spec.platforms if platform not in SYSTEMS]
        if unknown:
            raise UsageError(f"no system is known for {', '.join(unknown)}", hint=f"known: {', '.join(SYSTEMS)}")
        request = ImageRequest(
            flake=spec.flake,
            attr=spec.attribute,
            systems=",".join(SYSTEMS[platform] for platform in spec.platforms),
            push=spec.image_name if push else None,
        )
        # Every text is checked by its grammar here, before anything runs.
        wanted = image_spec(self._loaded, request, Path.cwd())
        # It learns every secret that is read. What a builder or a registry says may repeat one, or hold what a terminal
        # would obey: nothing of it is shown, or raised, as it came.
        redactor = Redactor()

        def say(text: object) -> None:
            self._say(printable(redactor.clean(str(text))))

        try:
            with BuildSession(self._loaded, redactor, self._environ, say=say) as session:
                result = build_image(wanted, session, on_event=say)
        except NixopsError as error:
            raise told(error, redactor) from None
        if result.digest is None:
            return str(result.images[0].out)
        return f"{spec.registry}/{spec.name}@{result.digest}"


def main() -> int:
    """Build what the command line describes; its name goes to stdout, progress to stderr."""
    parser = argparse.ArgumentParser(description="Build an image with nixops, as a workflow tool would.")
    parser.add_argument("--inventory", type=Path, default=Path("inventory/hosts.yml"))
    parser.add_argument("--flake", required=True)
    parser.add_argument("--attribute", default="docker")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--tag", default="latest")
    parser.add_argument("--platform", action="append", choices=sorted(SYSTEMS), help="may be given more than once")
    parser.add_argument("--no-push", action="store_true", help="build, and leave it on its builder")
    given = parser.parse_args()
    spec = ImageSpec(
        name=given.name,
        registry=given.registry,
        flake=given.flake,
        tag=given.tag,
        attribute=given.attribute,
        platforms=tuple(given.platform or ("linux/amd64",)),
    )
    try:
        builder = NixImageBuilder(given.inventory, say=lambda line: print(line, file=sys.stderr))
        print(builder.build(spec, push=not given.no_push))
    except NixopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:  # what was begun on the builders has been stopped by now
        return int(ExitCode.INTERRUPTED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
