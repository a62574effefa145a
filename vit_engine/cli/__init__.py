"""The command line ``vit-engine``: run, verify, info."""
