"""``python -m treepo_mcore``: what torchrun starts."""

from treepo_mcore.cli.app import main

if __name__ == "__main__":
    main()
