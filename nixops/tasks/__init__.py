"""The Invoke task collection. Nothing heavy is loaded before a task runs."""
