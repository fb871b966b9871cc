"""Tokenised corpora: .bin/.idx files, their manifests, and the order of training samples."""
