"""The `distckpt` command: one module per command, each with a function of the command's name."""
