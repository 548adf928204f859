"""One file a subcommand of `pear-megatron`; cli.py lists them."""
