"""Rules and data of your own: a file each, whose first lines say how to run it."""
