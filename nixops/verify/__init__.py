"""Checks of a runner on its host: :func:`nixops.verify.run.verify_runner`, one module per subject.

Nothing is imported here, so that the package's values can be named without loading testinfra.
"""
