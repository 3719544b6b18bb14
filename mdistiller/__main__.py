"""`python -m mdistiller` is the command `mdistiller`."""

from .commands.main import main

if __name__ == "__main__":
    main()
