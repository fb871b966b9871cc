"""What launcher and engine agree on, imported by both: errors and exit codes, entry point, claim, publishing."""
