"""Tokenised corpora: .bin and .idx files, their manifests, and the order of training samples."""
