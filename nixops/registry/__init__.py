"""Speaking to registries: image manifests, indexes, referrers, logins (OCI distribution specification)."""
