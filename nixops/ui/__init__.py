"""What people and machines see: progress on stderr, results on stdout."""
