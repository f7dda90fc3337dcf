"""All tasks, as `invoke --list` shows them."""

from __future__ import annotations

from invoke.collection import Collection

from nixops.tasks import build, completion, inventory, lab, runner, trust

ns = Collection()
ns.add_task(runner.deploy_runner)
ns.add_task(runner.verify_runner)
ns.add_task(runner.render)
ns.add_task(build.build_image)
ns.add_task(build.warm_cache)
ns.add_task(build.verify_cache)
ns.add_collection(build.ns, name="build")
ns.add_task(inventory.inventory)
ns.add_task(trust.trust)
ns.add_task(completion.completion)
ns.add_collection(lab.ns, name="lab")
