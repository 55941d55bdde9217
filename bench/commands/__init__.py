"""The subcommands of `python -m fastenc bench`, one module each: PURPOSE, add_arguments and run."""
