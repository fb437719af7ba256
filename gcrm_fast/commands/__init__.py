"""The subcommands of ``gcrm``, one file each: options and printing."""
