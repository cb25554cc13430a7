"""The enclave program: it moves data keys from AWS KMS to workers (docs/sealed.md)."""
