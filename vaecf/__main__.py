"""`python -m vaecf`, the same as the console script `vaecf`."""

from vaecf.commands import run_program

if __name__ == "__main__":
    run_program()
