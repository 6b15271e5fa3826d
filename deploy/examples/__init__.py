"""One's own verifier, data set and credit rule: a file each, its first lines say how to run it."""
