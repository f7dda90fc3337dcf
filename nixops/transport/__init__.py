"""Carrying commands: values (:mod:`.command`), the local machine (:mod:`.local`), hosts over SSH (:mod:`.ssh`)."""
