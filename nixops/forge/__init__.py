"""Forgejo: runner credentials by every version's way, and a workflow dispatched to try a runner."""
