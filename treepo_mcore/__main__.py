"""``python -m treepo_mcore``: what torchrun starts."""

from treepo_mcore.cli import main

if __name__ == "__main__":
    main()
