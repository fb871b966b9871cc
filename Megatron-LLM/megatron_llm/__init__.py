"""The training engine: it meets the launcher only at command lines, exit codes and files."""
