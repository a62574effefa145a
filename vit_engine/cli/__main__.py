"""``python -m vit_engine.cli``: the same as ``vit-engine``."""

from .app import main

if __name__ == "__main__":
    main()
