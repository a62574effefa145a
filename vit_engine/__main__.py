"""``python -m vit_engine``: the same as ``vit-engine``."""

from .cli.app import main

if __name__ == "__main__":
    main()
