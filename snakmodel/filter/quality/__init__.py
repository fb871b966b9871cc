"""The step `quality`: rules of Gopher, C4 and FineWeb that tell a text from what is no running text."""
