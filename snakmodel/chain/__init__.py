"""The stages of a run: declared, planned, and compared with what is done."""
