"""Where secrets are kept: OpenBao (KV v2, AppRole), and the references through which they are read."""
