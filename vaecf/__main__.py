"""`python -m vaecf`, the same as the console script `vaecf`."""

from vaecf.commands import run_program as main

if __name__ == "__main__":
    main()
