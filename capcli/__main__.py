"""`python -m capcli` and the console script `cap`."""

from capcli.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
