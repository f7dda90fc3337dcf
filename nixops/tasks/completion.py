"""`invoke completion`: Invoke completes tasks and flags; this also completes hosts, runners and groups."""

from __future__ import annotations

from invoke.tasks import task

from nixops.tasks.support import guarded


@task(
    auto_shortflags=False,
    help={
        "shell": 'bash or zsh; put eval "$(invoke completion --shell bash)" into your shell\'s start file',
        "words": "the words of a command line, one on each line: print what may stand at --current",
        "current": "which of the words is completed, the program being 0",
    },
)
@guarded
def completion(c, shell="bash", words="", current=0):  # type: ignore[no-untyped-def]  # invoke inspects the plain signature
    """Print the shell's completion script, which knows the inventory's hosts, runners and groups."""
    from nixops.inventory.complete import print_candidates, print_script

    if words:
        print_candidates(words.splitlines(), current)
    else:
        print_script(shell)
