"""`python -m ringmo` is the `ringmo` command."""

from ringmo.cli import main

if __name__ == "__main__":
    main()
