"""nixops: render, deploy and verify NixOS hosts, Forgejo runners and their secrets from one typed inventory.

Importing the package loads nothing heavy: fabric, boto3, hvac and testinfra come in where they are used.
"""

__version__ = "0.1.0"
