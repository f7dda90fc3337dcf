"""What leaves a task as an error."""

from __future__ import annotations

from nixops.errors import HostKeyUnknown, Interrupted, NixopsError
from nixops.secret import Redactor, Secret
from nixops.ui.ending import told


def test_a_command_that_an_error_tells_to_run_gets_the_inventory_that_the_task_was_given() -> None:
    error = HostKeyUnknown("no key", hint="invoke trust web", detail="a: no key is pinned (invoke trust a)")
    fit = told(error, Redactor(), "site/my hosts.yml")
    assert fit.hint == "invoke trust web --inventory 'site/my hosts.yml'"
    assert fit.detail == "a: no key is pinned (invoke trust a --inventory 'site/my hosts.yml')"


def test_the_default_inventory_needs_no_naming() -> None:
    assert (
        told(NixopsError("x", hint="invoke build.pool shows them"), Redactor()).hint == "invoke build.pool shows them"
    )


def test_secrets_are_replaced_in_every_text() -> None:
    redactor = Redactor([Secret("hunter22")])
    error = told(NixopsError("a hunter22", hint="b hunter22", detail="c hunter22"), redactor)
    assert (error.message, error.hint, error.detail) == ("a ***", "b ***", "c ***")


def test_an_interrupt_and_a_defect_are_errors_of_ours() -> None:
    assert isinstance(told(KeyboardInterrupt(), Redactor()), Interrupted)
    assert "a defect in nixops: ZeroDivisionError" in told(ZeroDivisionError("x"), Redactor()).message
