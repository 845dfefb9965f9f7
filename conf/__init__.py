"""Installed as `lightning_prune.conf`; Hydra's `pkg://` search path wants a package."""
