"""Gets raw corpora: downloads the sources that a file names, and makes of them files that `snakmodel.prepare` reads."""
