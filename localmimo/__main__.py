"""`python -m localmimo` is the command line."""

from localmimo.cli.app import main

if __name__ == "__main__":
    main()
