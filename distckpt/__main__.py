"""`python -m distckpt` is the `distckpt` command."""

from __future__ import annotations

from distckpt.cli.main import main

if __name__ == "__main__":
    main()
