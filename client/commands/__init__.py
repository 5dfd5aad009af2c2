"""The subcommands of `wicore`, one file each. Heavy imports stay inside functions, so that `--help` is quick."""
