"""The program that scrubs one GPU's memory between two leases, and verifies it: `python -m carwash`."""
