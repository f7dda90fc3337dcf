"""`invoke build-image`, `build`, `build.pool`, `warm-cache` and `verify-cache`."""

from __future__ import annotations

from invoke.collection import Collection
from invoke.tasks import task

from nixops.tasks.support import guarded

HELP = {
    "inventory": "the inventory file (default: inventory/hosts.yml)",
    "format": "text or json",
}
FLAKE = "the flake: a path, or a reference such as github:owner/repository"


@task(
    name="build-image",
    auto_shortflags=False,
    optional=["push"],
    help={
        **HELP,
        "image": "the image's name in the inventory (default: the inventory's default image)",
        "flake": FLAKE + " (default: the image's)",
        "attr": "the image in it: docker, or packages.{system}.docker (default: the image's)",
        "systems": "what to build it for, joined by commas (default: the image's)",
        "push": "push it: docker://registry/repository:tag, or without a value to the image's own destination",
        "provenance": "attach an in-toto statement of how it was built, in the registry",
    },
)
@guarded
def build_image(  # type: ignore[no-untyped-def]  # invoke inspects the plain signature
    c,
    image=None,
    flake=None,
    attr=None,
    systems=None,
    push=None,
    provenance=False,
    inventory="inventory/hosts.yml",
    format="text",
):
    """Build an image natively for each system on the pool of builders; with --push, push it from there."""
    from nixops.build.commands import ImageOptions, build_image
    from nixops.build.request import ImageRequest

    request = ImageRequest(image=image, flake=flake, attr=attr, systems=systems, push=push, provenance=provenance)
    build_image(ImageOptions(request=request, inventory=inventory, format=format))


@task(
    auto_shortflags=False,
    default=True,
    help={
        **HELP,
        "flake": FLAKE,
        "attr": "what to build in it: hello, or packages.{system}.hello",
        "systems": "what to build it for, joined by commas (default: the pool's, where it has only one)",
        "distributed": "hand the graph to Nix's own distributed build over the whole pool",
        "local-jobs": "with --distributed: how many derivations this machine may build itself",
        "out-link": "with --distributed: a link to the result, which keeps it from garbage collection",
    },
)
@guarded
def build(  # type: ignore[no-untyped-def]  # as above
    c,
    flake=None,
    attr=None,
    systems=None,
    distributed=False,
    local_jobs="0",
    out_link=None,
    inventory="inventory/hosts.yml",
    format="text",
):
    """Build any attribute of a flake on the pool: on the best builder, or with --distributed on all of them."""
    from nixops.build.commands import BuildOptions, build

    build(
        BuildOptions(
            flake=flake,
            attr=attr,
            systems=systems,
            distributed=distributed,
            local_jobs=local_jobs,
            out_link=out_link,
            inventory=inventory,
            format=format,
        )
    )


@task(auto_shortflags=False, help={**HELP, "system": "only the builders of this system"})
@guarded
def pool(c, system=None, inventory="inventory/hosts.yml", format="text"):  # type: ignore[no-untyped-def]  # as above
    """Ask every builder at once: reachable, key, Nix, cores, load, room, features, and why one is left out."""
    from nixops.build.commands import PoolOptions, show_pool

    show_pool(PoolOptions(system, inventory=inventory, format=format))


@task(
    name="warm-cache",
    auto_shortflags=False,
    help={**HELP, "host": "a host's name in the inventory", "group": "all hosts of this group"},
)
@guarded
def warm_cache(c, host=None, group=None, inventory="inventory/hosts.yml", format="text"):  # type: ignore[no-untyped-def]  # as above
    """Build hosts' systems on the cache host, and prove that the cache serves every path, signed by its key."""
    from nixops.build.commands import WarmOptions, warm_cache

    warm_cache(WarmOptions(host, group, inventory=inventory, format=format))


@task(
    name="verify-cache",
    auto_shortflags=False,
    help={**HELP, "host": "a host's name in the inventory", "group": "all hosts of this group"},
)
@guarded
def verify_cache(c, host=None, group=None, inventory="inventory/hosts.yml", format="text"):  # type: ignore[no-untyped-def]  # as above
    """Ask the cache for every path of hosts' systems, as they would; builds nothing."""
    from nixops.build.commands import WarmOptions, verify_cache

    verify_cache(WarmOptions(host, group, inventory=inventory, format=format))


ns = Collection("build", build, pool)
