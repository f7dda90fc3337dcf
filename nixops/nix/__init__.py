"""Nix: its verbs (:mod:`.verbs`), its log (:mod:`.log`), closures (:mod:`.closure`), copying (:mod:`.copy`)."""
