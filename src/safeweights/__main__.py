"""``python -m safeweights``: the command line."""

from safeweights.cli.main import main

if __name__ == "__main__":
    main()
