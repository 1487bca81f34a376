"""Target profiles, one TOML file each; see `rkd.target`."""
