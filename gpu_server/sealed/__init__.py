"""The sealed path: what client, enclave and worker compute, and the service passes on. See docs/sealed.md.

Imports nothing else of gpu_server: worker and enclave images copy this folder alone.
"""
