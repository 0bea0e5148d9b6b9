"""Run the command line as `python -m refusalkit`."""

from refusalkit.cli import main

if __name__ == "__main__":
    main()
