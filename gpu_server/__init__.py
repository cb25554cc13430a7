"""gpu-server: leases the GPUs of a machine to containers, one tenant each, and streams what they do."""

__version__ = "0.1.0"
