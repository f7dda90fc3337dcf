"""From the inventory to files: Jinja2 templates whose values become literals of the target language.

:mod:`.literal` writes a value, :mod:`.guard` sees to it that each stands where a literal may stand,
:mod:`.engine` runs a template, :mod:`.runner` knows which templates a runner needs, :mod:`.managed` and
:mod:`.files` keep the results beside the user's own files, :mod:`.git` and :mod:`.flake` deal with the checkout.
"""
