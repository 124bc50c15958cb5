"""`python -m spdcli` is `spd`."""

from spdcli.cli import main

if __name__ == "__main__":
    main()
