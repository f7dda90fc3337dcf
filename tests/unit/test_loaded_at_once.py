"""Clients are loaded when first used, maybe by two threads at once: neither may find what the other has half loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOADING = """
import sys, threading
from pathlib import Path
from nixops.build.session import BuildSession
from nixops.inventory.load import load
from nixops.secret import Redactor
from nixops.values import RegistryName
sys.setswitchinterval(1e-5)
environ = {"BAO_ADDR": "http://127.0.0.1:1", "BAO_TOKEN": "s.0123456789abcdef"}
together = threading.Barrier(2)
found = []
with BuildSession(load(Path(sys.argv[1])), Redactor(), environ) as session:
    def use(client):
        together.wait()
        try:
            client()
            found.append("loaded")
        except BaseException as error:
            found.append(repr(error))
    clients = (lambda: session.registry(RegistryName("registry.example.org")), session._openbao)
    threads = [threading.Thread(target=use, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(found)
"""


def test_a_registry_and_openbao_may_be_needed_at_the_same_moment(tmp_path: Path) -> None:
    """As where the builders' key is kept in OpenBao, and something is pushed. Two in three went wrong, if any did."""
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("hosts: {one: {address: 192.0.2.1}}\n")
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", LOADING, str(inventory)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "['loaded', 'loaded']\n", done.stdout + done.stderr
