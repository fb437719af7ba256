"""What every wing uses: errors, options, files, tables, processes, statistics."""
