"""`python -m mpipipe` is the same as the `mpipipe` command."""

from mpipipe.cli.main import main

if __name__ == "__main__":
    main()
